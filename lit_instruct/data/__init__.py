"""Text to records: read rows, validate, tokenise, collate, and serve them to Lightning.

``formats`` and ``sources`` read rows from files and hubs, ``records`` validates them, ``encoding`` turns text into
token ids, ``bad_rows`` says what is wrong with rows that cannot be used, ``collate`` pads ids into batches,
``sampling`` says which rank sees which row, and ``base`` with ``modules`` are the LightningDataModules. Importing this
package imports nothing else.
"""
