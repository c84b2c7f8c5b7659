"""``mode=train``: the run around the trainer, its folder, resuming, signals. Start at ``mode.py``.

Imports the rooms below it (training, checkpoints, tracking, …), none beside it.
"""
