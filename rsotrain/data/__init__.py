"""From documents to batches of tokens, the same on every number of ranks. Start at ``build.py``.

Imports the configuration alone.
"""
