"""Checkpoints: their files, and writing them in the background. Start at ``files.py``.

Imports ``parallel`` alone: what the tensors mean is for others to know.
"""
