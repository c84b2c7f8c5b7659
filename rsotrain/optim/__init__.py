"""The optimizers, one for each group of parameters. Start at ``build.py``, then ``base.py``.

This package may import ``models`` and everything below it. Update rules are pure functions.
"""
