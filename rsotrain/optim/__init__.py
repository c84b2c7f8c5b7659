"""The optimizers, each made of parts with one clock. Start at ``build.py``, then ``base.py``.

Imports ``subspace``, the subspace linears of ``models`` and ``parallel``. Update rules are pure functions.
"""
