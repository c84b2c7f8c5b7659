"""Ranks, the shards of weights, and what is sent between them. Start at ``ranks.py``.

Imports the configuration alone.
"""
