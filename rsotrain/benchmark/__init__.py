"""``mode=benchmark``: how fast a configuration trains on this machine. Start at ``mode.py``.

Imports training and what lies below it, none of the rooms beside it.
"""

# of a training step, in the order in which they are shown
DATA, FORWARD, BACKWARD, OPTIMIZER, REFRESH, OTHER = PHASES = (
    "data", "forward", "backward", "optimizer", "refresh", "other",
)  # fmt: skip
