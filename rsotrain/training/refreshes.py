"""Refreshes of bases, whenever they are wanted: to time them, to plan them."""

from collections.abc import Iterator
from contextlib import contextmanager

from rsotrain.optim.with_bases import OptimizerWithBases
from rsotrain.subspace.schedule import RefreshSchedule
from rsotrain.training.trainer import Trainer


def groups_with_bases(trainer: Trainer) -> list[OptimizerWithBases]:
    return [group for group in trainer.optimizer.groups if isinstance(group, OptimizerWithBases)]


def update_gap(trainer: Trainer) -> int | None:
    """Steps between refreshes, of several methods those of the most frequent; None without bases."""
    return min((group.subspace.gap for group in groups_with_bases(trainer)), default=None)


@contextmanager
def all_bases_due(trainer: Trainer) -> Iterator[None]:
    """The next step refreshes all bases, none of them for the first time, whatever the schedule."""
    optimizer, groups = trainer.optimizer, groups_with_bases(trainer)
    schedules, steps_done = [group.bases.schedule for group in groups], optimizer.steps_done
    alike = len({(group.subspace.gap, group.samples_ahead) for group in groups}) == 1
    for group in groups:
        gap = group.subspace.gap
        # those of several methods fall into one step if each step has some
        group.bases.schedule = RefreshSchedule(gap if alike else 1, len(group.bases.sizes), staggered=False)
        optimizer.steps_done = 2 * gap - group.samples_ahead
    try:
        yield
    finally:
        optimizer.steps_done = steps_done
        for group, schedule in zip(groups, schedules, strict=True):
            group.bases.schedule = schedule
