"""The typed configuration, its keys and ranges. Start at ``schema.py``.

Imports neither torch nor Hydra, so that ``rsotrain --help`` stays quick and a notebook can build any class.
"""
