"""What runs say of one method against another, and how sure they are."""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from rsotrain.report.comparison import REPLICATE_KEY, Group, differing_keys, short
from rsotrain.report.records import number_of
from rsotrain.report.runs import Run

# Student's t for 95 %, by degrees of freedom from 1 on; beyond them the last, which errs towards doubt.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# What is a method's own. Methods are compared on one job: where anything else differs they are not.
OWN_KEYS = ("optimizer.", "sampler.", REPLICATE_KEY)
# But not these: what is compared is the method, not the weights that it has, how the others are trained, or
# the precision of its state.
SHARED_KEYS = ("optimizer.block_parameters", "optimizer.state_dtype", "optimizer.rest")
# With equal fingerprints of data and tokenizer, where the files lay does not matter.
PATH_KEYS = ("data.path", "data.validation_path", "tokenizer.path")

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

    def verdict_below(self, limit: float) -> Verdict:
        """Is it less than ``limit``?"""
        return self.verdict(math.nextafter(limit, -math.inf))

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

    A method is an optimizer with its own sampler. ``groups``: of runs that differ in the seed alone;
    ``samplers``: optimizer's name -> that sampler's.
    """

    def __init__(self, groups: Sequence[Group], samplers: dict[str, str]) -> None:
        self._groups = {
            method: [g for g in groups if _is(g, method, sampler)] for method, sampler in samplers.items()
        }

    def any(self) -> bool:
        """Is there a run of any of the methods?"""
        return any(self._groups.values())

    def runs(self, method: str) -> dict[int, Run]:
        """By seed. Raises NoEvidence where there is none, several of a seed, or several settings; where one
        has failed, since the others would then be a choice.
        """
        groups = self._groups[method]
        if len(groups) > 1:
            raise NoEvidence(f"there are {len(groups)} settings of {method}; leave one")
        if failed := [run for group in groups for run in group.failed]:
            raise NoEvidence(f"{failed[0].name}, a run of {method}, has failed")
        runs: dict[int, Run] = {}
        for run in groups[0].finished if groups else []:
            seed = run.config.get(REPLICATE_KEY, 0)
            if not isinstance(seed, int):
                raise NoEvidence(f"the seed of {run.name} is {short(repr(seed))}")
            if seed in runs:
                raise NoEvidence(f"there are two runs of {method} of seed {seed}; leave one")
            runs[seed] = run
        if not runs:
            raise NoEvidence(f"no finished run of {method}")
        return runs

    def pairs(self, one: str, other: str, also: Collection[str] = ()) -> list[tuple[Run, Run]]:
        """The runs of both with the same seed: the same first weights, the same data in the same order.

        ``also``: keys, or groups of them, that must be equal beside those of the job. Raises NoEvidence.
        """
        ours, theirs = self.runs(one), self.runs(other)
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        if not pairs:
            raise NoEvidence(f"{one} and {other} share no seed")
        runs = [run for pair in pairs for run in pair]
        shared = {*SHARED_KEYS, *also}
        differing = [k for k in differing_keys(runs, also) if k in shared or not k.startswith(OWN_KEYS)]
        fingerprints = {run.data_fingerprint for run in runs}
        if len(fingerprints) == 1 and None not in fingerprints:
            differing = [key for key in differing if key not in PATH_KEYS]
        if differing:
            raise NoEvidence(f"the runs of {one} and {other} differ in {', '.join(differing[:3])}")
        if self._groups[one][0].mark != self._groups[other][0].mark:  # equal settings, other files
            raise NoEvidence(f"the validation data of {one} and {other} are not the same")
        return pairs


def of_their_job(members: Sequence[Run], neighbours: Iterable[Run]) -> list[Run]:
    """Those of ``neighbours`` that differ from a member in method and seed alone.

    Of a method that is among the members, only with a member's settings: else it is another trial of it.
    """

    def belongs(run: Run) -> bool:
        if all(any(not k.startswith(OWN_KEYS) for k in differing_keys([m, run])) for m in members):
            return False
        own = [m for m in members if _method(m) == _method(run)]
        return not own or any(set(differing_keys([m, run])) <= {REPLICATE_KEY} for m in own)

    return [run for run in neighbours if belongs(run)]


def _method(run: Run) -> tuple[object, object]:
    """Its optimizer and its sampler. A run with several methods is none of any of them."""
    groups = run.config.get("optimizer.groups")
    name = run.config.get("optimizer.name")
    return f"{name} and {groups}" if groups else name, run.config.get("sampler.name")


def _is(group: Group, method: str, sampler: str) -> bool:
    return _method(group.runs[0]) == (method, sampler)


def values(runs: Iterable[Run], figure: Figure) -> list[float]:
    """``figure`` of each run; NoEvidence where one has none."""
    return [_known(figure(run), run) for run in runs]


def differences(pairs: Sequence[tuple[Run, Run]], figure: Figure) -> list[float]:
    """``figure`` of the first of each pair less that of the second. Raises NoEvidence."""
    return [_known(figure(a), a) - _known(figure(b), b) for a, b in pairs]


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
    """Median time of a draw of all bases; ``per_step``: divided by the steps T from one to the next.

    What is logged is the time of a step's draws: all, or of staggered ones a T-th (of no fewer than T).
    """

    def figure(run: Run) -> float | None:
        seconds = [point[3] for point in run.series("subspace/refresh_seconds")]
        gap = number_of(run.config.get("optimizer.update_proj_gap")) or 1
        logged_per_step = bool(run.config.get("optimizer.staggered"))
        return statistics.median(seconds) * gap ** (logged_per_step - per_step) if seconds else None

    return figure


def log_of(figure: Figure) -> Figure:
    """Its natural logarithm: differences are ratios then."""

    def logarithm(run: Run) -> float | None:
        value = figure(run)
        return math.log(value) if value is not None and value > 0 else None

    return logarithm


def exp(value: float) -> float:
    """Infinite where it is too large for a number: the perplexity of a run that diverged."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


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
