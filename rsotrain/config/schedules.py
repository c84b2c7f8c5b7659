"""Learning-rate schedules: their settings, and the factor on every peak rate after the warm-up.

A schedule is a class here and a file in ``conf/lr_scheduler/``; ``training/lr_scheduler.py`` asks it.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from omegaconf import MISSING

from rsotrain.config.meanings import means
from rsotrain.config.ranges import COUNT, number

Schedule = TypeVar("Schedule", bound="type[LRSchedulerConfig]")
SCHEDULES: "dict[str, type[LRSchedulerConfig]]" = {}  # by the name of the schema


def schedule(schema: str) -> Callable[[Schedule], Schedule]:
    """Register a schedule under the name ``schema``."""

    def register(settings: Schedule) -> Schedule:
        assert schema not in SCHEDULES, f"two schedules are called {schema} in {__name__}"
        SCHEDULES[schema] = settings
        return settings

    return register


@dataclass
class LRSchedulerConfig:
    """Linear warm-up, then what ``after_warmup`` says."""

    name: str = means("name of the schedule", MISSING)
    warmup_fraction: float = means(
        "share of the steps in which the rate rises linearly to its peak", number(0.1, at_least=0, at_most=1)
    )
    warmup_steps: int | None = means(
        "the same as a number of steps, which then counts; null: by warmup_fraction",
        number(None, at_least=0, at_most=COUNT),
        unit="optimizer steps",
    )

    @abstractmethod
    def after_warmup(self, step: int, total_steps: int, progress: float) -> float:
        """The factor of the update with 0-based index ``step``, after the warm-up.

        ``progress``, in (0, 1]: the share of the way from the end of the warm-up to the last update.
        """


@schedule("constant")
@dataclass
class ConstantConfig(LRSchedulerConfig):
    """The peak rate to the end."""

    def after_warmup(self, step: int, total_steps: int, progress: float) -> float:
        return 1.0


@schedule("cosine")
@dataclass
class CosineConfig(LRSchedulerConfig):
    """A half cosine down to ``min_ratio`` of the peak at the last step."""

    min_ratio: float = means("rate at the last step, of the peak", number(0.1, at_least=0, at_most=1))

    def after_warmup(self, step: int, total_steps: int, progress: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * progress)) / 2


@schedule("linear")
@dataclass
class LinearConfig(LRSchedulerConfig):
    """A straight line down to ``min_ratio`` of the peak at the last step."""

    min_ratio: float = means("rate at the last step, of the peak", number(0.0, at_least=0, at_most=1))

    def after_warmup(self, step: int, total_steps: int, progress: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * (1 - progress)


@schedule("wsd")
@dataclass
class WSDConfig(LRSchedulerConfig):
    """Warm-up, stable, then a straight line down to ``min_ratio`` over the last ``decay_fraction``."""

    decay_fraction: float = means(
        "share of the steps, at the end, in which the rate falls", number(0.2, at_least=0, at_most=1)
    )
    min_ratio: float = means("rate at the last step, of the peak", number(0.0, at_least=0, at_most=1))

    def after_warmup(self, step: int, total_steps: int, progress: float) -> float:
        decay = round(self.decay_fraction * total_steps)
        if step < total_steps - decay:
            return 1.0
        return self.min_ratio + (1 - self.min_ratio) * (total_steps - 1 - step) / decay
