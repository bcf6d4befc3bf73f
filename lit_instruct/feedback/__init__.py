"""Human feedback: labelers rank responses, write demonstrations and look after prompts in a browser.

``tasks`` reads what is to be labelled, ``forms`` says what an answer may hold, ``store`` keeps every answer in one
SQLite file (its tables: ``database``) and ``labels`` reads it out. ``server`` serves the page in ``page/`` over it,
``access`` decides who may call, ``guidelines`` are for the labelers, and ``command`` is ``lit-instruct label``.

Around the page: ``sampling`` draws the responses to rank (``lit-instruct sample``), ``rows`` are labels in files, which
``argilla`` and ``label_studio`` turn into what those programs read (``lit-instruct labels``), and ``agreement`` tells
how far labelers agree (``lit-instruct agreement``). ``round`` is all of it, and training and comparing between
(``lit-instruct round``).

Importing this package imports nothing else.
"""
