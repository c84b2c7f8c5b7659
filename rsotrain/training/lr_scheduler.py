"""The learning-rate schedule: the factor of all peak learning rates as a pure function of the step."""

from rsotrain.config.schedules import LRSchedulerConfig


def warmup_steps(config: LRSchedulerConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_fraction * total_steps)


def lr_factor(config: LRSchedulerConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for the update with 0-based index ``step``.

    Warm-up is linear and reaches 1 at update ``warmup_steps - 1``. The cosine reaches its ``min_ratio`` at
    the last update, ``total_steps - 1``; a straight line would reach it one update later, since an update
    with the rate 0 trains nothing.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    # asked after the last update, too, for what the next one would be
    return config.after_warmup(step, max(total_steps, warmup + 1), warmup)
