"""LLaMA with its loss and its text, and the linears that RSO trains. Start at ``llama.py``.

Imports ``subspace``, ``data`` and ``parallel``.
"""
