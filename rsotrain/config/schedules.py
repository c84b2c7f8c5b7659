"""Learning-rate schedules: their settings, and the factor on every peak rate after the warm-up.

A schedule is a class here and a file in ``conf/lr_scheduler/``; ``training/lr_scheduler.py`` asks it.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from omegaconf import MISSING

from rsotrain.config.later import later
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


class EndOfDecay(Enum):
    """When a straight line reaches its end. after_last_update: the last update still trains. at_last_update:
    the last update has the end's rate, so that with min_ratio=0 it trains nothing; older runs have it so."""

    after_last_update = "after_last_update"
    at_last_update = "at_last_update"


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
    def after_warmup(self, step: int, total_steps: int, warmup: int) -> float:
        """The factor of the update with 0-based index ``step``, of ``total_steps``; ``warmup``: the first."""


@schedule("constant")
@dataclass
class ConstantConfig(LRSchedulerConfig):
    """The peak rate to the end."""

    def after_warmup(self, step: int, total_steps: int, warmup: int) -> float:
        return 1.0


@schedule("cosine")
@dataclass
class CosineConfig(LRSchedulerConfig):
    """A half cosine down to ``min_ratio`` of the peak at the last step."""

    min_ratio: float = means("rate at the last step, of the peak", number(0.1, at_least=0, at_most=1))

    def after_warmup(self, step: int, total_steps: int, warmup: int) -> float:
        progress = (step - warmup + 1) / (total_steps - warmup)
        return self.min_ratio + (1 - self.min_ratio) * (1 + math.cos(math.pi * progress)) / 2


@schedule("linear")
@dataclass
class LinearConfig(LRSchedulerConfig):
    """A straight line from the peak down to ``min_ratio`` of it, which ``end`` says when it reaches."""

    min_ratio: float = means("rate at the end of the line, of the peak", number(0.0, at_least=0, at_most=1))
    end: EndOfDecay = means(
        "when the straight line reaches its end",
        later(EndOfDecay.after_last_update, before=EndOfDecay.at_last_update),
    )

    def after_warmup(self, step: int, total_steps: int, warmup: int) -> float:
        done = step - warmup + (self.end is EndOfDecay.at_last_update)
        return self.min_ratio + (1 - self.min_ratio) * (1 - done / (total_steps - warmup))


@schedule("wsd")
@dataclass
class WSDConfig(LRSchedulerConfig):
    """Warm-up, stable, then a straight line down to ``min_ratio`` over the last ``decay_fraction``."""

    decay_fraction: float = means(
        "share of the steps, at the end, in which the rate falls", number(0.2, at_least=0, at_most=1)
    )
    min_ratio: float = means("rate at the end of the line, of the peak", number(0.0, at_least=0, at_most=1))
    end: EndOfDecay = means(
        "when the straight line reaches its end",
        later(EndOfDecay.after_last_update, before=EndOfDecay.at_last_update),
    )

    def after_warmup(self, step: int, total_steps: int, warmup: int) -> float:
        decay = round(self.decay_fraction * total_steps)
        if step < total_steps - decay:
            return 1.0
        left = total_steps - step - (self.end is EndOfDecay.at_last_update)
        return self.min_ratio + (1 - self.min_ratio) * left / decay
