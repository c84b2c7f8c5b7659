"""What runs say of one method against another, and how sure they are."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from rsotrain.report.comparison import Group
from rsotrain.report.runs import Run

# Student's t for 95 %, by degrees of freedom from 1 on; beyond them the last, which errs towards doubt.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Two methods are compared on one job: where these differ they are not.
SAME_JOB = ("model.name", "steps", "batch_size", "seq_len", "precision")

Figure = Callable[[Run], float | None]


class Verdict(Enum):
    confirmed = "confirmed"
    refuted = "not confirmed"
    undecided = "not decided by these runs"


class NoEvidence(Exception):  # noqa: N818 (an answer, not an error)
    """Why the runs say nothing, in a few words."""


@dataclass(frozen=True)
class Interval:
    """The mean of ``number`` seeds, and how far to either side its 95 % confidence interval goes.

    ``margin``: None for one seed, which has no spread.
    """

    mean: float
    margin: float | None
    number: int

    def __neg__(self) -> "Interval":
        return Interval(-self.mean, self.margin, self.number)

    def verdict(self, at_most: float) -> Verdict:
        """Is it at most so much? Decided where the whole interval lies on one side."""
        if self.margin is None:
            return Verdict.undecided
        if self.mean + self.margin <= at_most:
            return Verdict.confirmed
        return Verdict.refuted if self.mean - self.margin > at_most else Verdict.undecided

    def show(self, form: Callable[[float], str]) -> str:
        if self.margin is None:
            return f"{form(self.mean)} (one seed: no spread)"
        low, high = form(self.mean - self.margin), form(self.mean + self.margin)
        return f"{form(self.mean)} [{low}, {high}] over {self.number} seeds"


def interval_of(values: Sequence[float]) -> Interval:
    """By Student's t. ``values``: one a seed, at least one."""
    number, mean = len(values), statistics.fmean(values)
    if number == 1:
        return Interval(mean, None, 1)
    quantile = T_95[min(number - 1, len(T_95)) - 1]
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(number), number)


class Evidence:
    """The finished runs of each method, by seed.

    A method is an optimizer with its own sampler. ``samplers``: optimizer's name -> that sampler's.
    """

    def __init__(self, groups: Sequence[Group], samplers: dict[str, str]) -> None:
        self._groups = {
            method: [g for g in groups if _is(g, method, sampler)] for method, sampler in samplers.items()
        }

    def any(self) -> bool:
        """Is there a run of any of the methods?"""
        return any(self._groups.values())

    def runs(self, method: str) -> dict[int, Run]:
        """Raises NoEvidence where there is none, or several settings of it."""
        groups = self._groups[method]
        if len(groups) > 1:
            raise NoEvidence(f"there are {len(groups)} settings of {method}; leave one")
        runs = groups[0].finished if groups else []
        if not runs:
            raise NoEvidence(f"no finished run of {method}")
        return {int(run.config.get("seed", 0)): run for run in reversed(runs)}

    def values(self, method: str, figure: Figure) -> list[float]:
        """``figure`` of each run; NoEvidence where one has none."""
        return [_known(figure(run), run) for run in self.runs(method).values()]

    def pairs(self, one: str, other: str) -> list[tuple[Run, Run]]:
        """The runs of both with the same seed: the same first weights, the same data in the same order.

        Raises NoEvidence.
        """
        ours, theirs = self.runs(one), self.runs(other)
        first, second = next(iter(ours.values())), next(iter(theirs.values()))
        for key in SAME_JOB:
            if first.config.get(key) != second.config.get(key):
                raise NoEvidence(f"{one} and {other} differ in {key}")
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if not pairs:
            raise NoEvidence(f"{one} and {other} share no seed")
        return pairs

    def differences(self, one: str, other: str, figure: Figure) -> list[float]:
        """``figure`` of ``one`` less that of ``other``, seed by seed. Raises NoEvidence."""
        return [_known(figure(a), a) - _known(figure(b), b) for a, b in self.pairs(one, other)]


def _is(group: Group, method: str, sampler: str) -> bool:
    config = group.runs[0].config
    return (config.get("optimizer.name"), config.get("sampler.name")) == (method, sampler)


def _known(value: float | None, run: Run) -> float:
    if value is None:
        raise NoEvidence(f"{run.name} has no such figure")
    return value


# --- figures of one run --------------------------------------------------------------------------------


def last(metric: str) -> Figure:
    return lambda run: run.last(metric)


def mean_between(metric: str, begin: float, end: float) -> Figure:
    """Mean of what was logged after the share ``begin`` of the steps, up to ``end``."""

    def figure(run: Run) -> float | None:
        values = [p[3] for p in run.series(metric) if begin * run.steps < p[0] <= end * run.steps]
        return statistics.fmean(values) if values else None

    return figure


def refresh_seconds(per_step: bool) -> Figure:
    """Median time of a step's draws; ``per_step``: divided by the steps from one to the next."""

    def figure(run: Run) -> float | None:
        seconds = [point[3] for point in run.series("subspace/refresh_seconds")]
        gap = float(run.config.get("optimizer.update_proj_gap") or 1)
        return statistics.median(seconds) / (gap if per_step else 1) if seconds else None

    return figure


def log_of(figure: Figure) -> Figure:
    """Its natural logarithm: differences are ratios then."""

    def logarithm(run: Run) -> float | None:
        value = figure(run)
        return math.log(value) if value is not None and value > 0 else None

    return logarithm


def tokens_to_reach(run: Run, loss: float) -> float | None:
    """Tokens at which the validation loss first was ``loss``, on a straight line between evaluations."""
    before: tuple[float, float] | None = None
    for _, tokens, _, value in run.series("val/loss"):
        if value <= loss:
            if before is None:
                return tokens
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None
