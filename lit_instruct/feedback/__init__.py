"""Human feedback: labelers rank responses, write demonstrations and look after prompts in a browser.

``tasks`` reads what is to be labelled, ``forms`` says what an answer may hold, ``store`` keeps every answer in one
SQLite file (its tables: ``database``) and ``labels`` reads it out. ``server`` serves the page in ``page/`` over it,
``access`` decides who may call, ``guidelines`` are for the labelers, and ``command`` is ``lit-instruct label``.
Importing this package imports nothing else.
"""
