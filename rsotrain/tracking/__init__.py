"""What a run tells: metrics, loggers, Weights & Biases, the display, pictures. Start at ``loggers.py``.

Imports the configuration alone.
"""
