"""Learning-rate schedules: the factor on every peak rate as a pure function of the step."""

import math

from rsotrain.config.schema import ConstantConfig, CosineConfig, LinearConfig, LRSchedulerConfig, WSDConfig


def warmup_steps(config: LRSchedulerConfig, total_steps: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round(config.warmup_fraction * total_steps)


def lr_factor(config: LRSchedulerConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for the update with 0-based index ``step``.

    Warm-up is linear and reaches 1 at update ``warmup_steps - 1``; each decay reaches its
    ``min_ratio`` at the last update, ``total_steps - 1``.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    last = total_steps - 1
    # in (0, 1]: the share of the way from the end of the warm-up to the last update
    progress = (step - warmup + 1) / max(last - warmup + 1, 1)
    match config:
        case CosineConfig(min_ratio=low):
            return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
        case LinearConfig(min_ratio=low):
            return low + (1 - low) * (1 - progress)
        case WSDConfig(decay_fraction=fraction, min_ratio=low):
            decay = round(fraction * total_steps)
            if step < total_steps - decay:
                return 1.0
            return low + (1 - low) * (last - step) / decay
        case ConstantConfig():
            return 1.0
    raise AssertionError(f"no rule for {type(config).__name__}")
