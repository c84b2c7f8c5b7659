"""Low-rank bases: how they are sampled, refreshed and projected on. Start at ``samplers.py``.

Imports ``parallel`` and ``instruments`` alone.
"""
