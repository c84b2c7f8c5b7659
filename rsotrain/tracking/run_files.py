"""The files of a run folder, for those who write them and those who read them."""

from enum import Enum

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
RUN_RECORD = "run.json"
LOG = "train.log"
LOCK = ".lock"
FILES = (LOCK, CONFIG, METRICS, SUMMARY, RUN_RECORD, LOG)
CHECKPOINTS = "checkpoints"
WANDB = "wandb"
DIVERGED = "diverged"  # in RUN_RECORD, of a run that failed since its loss was not finite


class RunState(Enum):
    """What a run folder says of its run. lost: it was running and nobody hears of it any more."""

    running = "running"
    stopped = "stopped"  # before the last step, everything saved
    failed = "failed"
    finished = "finished"
    lost = "lost"
