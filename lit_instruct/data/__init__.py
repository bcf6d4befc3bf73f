"""Text to records: read rows, validate, tokenise, collate, and serve them to Lightning.

``sources`` reads rows from files and hubs, ``records`` validates them, ``encoding`` turns text into token ids,
``collate`` pads ids into batches, ``sampling`` says which rank sees which row, and ``base`` with ``modules`` are the
LightningDataModules. Importing this package imports nothing else.
"""
