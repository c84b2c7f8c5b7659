"""Low-rank bases: how they are sampled, refreshed and projected on. Start at ``samplers.py``.

This package may import ``parallel``, ``instruments`` and everything below them.
"""
