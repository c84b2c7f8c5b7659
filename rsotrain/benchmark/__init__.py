"""How fast a configuration trains on this machine: ``mode=benchmark``."""

# of a training step, in the order in which they are shown
DATA, FORWARD, BACKWARD, OPTIMIZER, REFRESH, OTHER = PHASES = (
    "data", "forward", "backward", "optimizer", "refresh", "other",
)  # fmt: skip
