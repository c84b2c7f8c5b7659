"""Runs side by side: which belong together, whether they can be compared, mean and spread of each group."""

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rsotrain.config.identity import OPERATIONAL_KEYS
from rsotrain.config.keys import did_you_mean
from rsotrain.errors import UserError
from rsotrain.report.runs import Run
from rsotrain.tracking.formats import format_bytes, format_count, format_seconds
from rsotrain.tracking.run_files import RunState

REPLICATE_KEY = "seed"  # runs that differ in nothing else are repetitions of each other
# What a validation loss depends on besides weights and documents: how these are laid out in sequences.
LAYOUT_KEYS = ("seq_len", "evaluation.max_tokens", "data.packing", "data.document_mask")
# How training documents are read, which does not change validation.
READING_KEYS = ("data.streaming", "data.shuffle", "data.lanes", "data.shuffle_buffer", "data.workers")
LONGEST_VALUE = 60  # characters of a setting in a label
MOST_SETTINGS = 4  # in a label
# Operational, so runs that differ in them are one group; their bytes and their speed depend on them.
BYTES_KEYS = ("micro_batch_size", "parallelism")


class Column(NamedTuple):
    """One figure of the table.

    ``better``: min or max of the groups is the best; None where neither is. ``spreads``: a table shows the
    spread, too.
    """

    metric: str
    label: str
    form: Callable[[float], str]
    better: Callable[[Sequence[float]], float] | None
    spreads: bool = True


def _digits(number: int) -> Callable[[float], str]:
    """So many behind the point; of a run that diverged the power of ten."""
    return lambda value: f"{value:.{number}f}" if abs(value) < 1e7 else f"{value:.3g}"


PEAK = "memory/peak_bytes"
ALLOCATED_ONLY = "memory/gathered_and_temporaries_bytes"  # logged where the peak is of a GPU's allocator
COLUMNS = (
    Column("val/loss", "validation loss", _digits(4), min),
    Column("val/perplexity", "perplexity", _digits(2), min),
    Column("val/bits_per_byte", "bits/byte", _digits(4), min),
    Column("throughput/tokens_per_second", "tokens/s", format_count, max),
    Column(PEAK, "peak memory", format_bytes, min, spreads=False),
    Column("memory/optimizer_state_bytes", "optimizer state", format_bytes, min, spreads=False),
    Column("tokens", "tokens", format_count, None, spreads=False),
    Column("time", "wall time", format_seconds, None, spreads=False),
)
LOSS, THROUGHPUT = COLUMNS[0], COLUMNS[3]


class Statistic(NamedTuple):
    """Mean, and standard deviation (n - 1) where there are several, over ``number`` runs."""

    mean: float
    spread: float | None
    number: int

    def show(self, column: Column) -> str:
        spread = f" ± {column.form(self.spread)}" if column.spreads and self.spread is not None else ""
        return column.form(self.mean) + spread


@dataclass(frozen=True)
class Group:
    """Runs that count as repetitions. ``mark``: which validation data they have, where that differs."""

    label: str
    runs: Sequence[Run]
    varies: Sequence[str] = ()
    mark: str = ""

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs if run.state is RunState.failed]

    def statistic(self, metric: str) -> Statistic | None:
        """Over the finished runs; over all while none is. None where no run has the metric."""
        values = [v for run in (self.finished or self.runs) if (v := run.last(metric)) is not None]
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Statistic(statistics.fmean(values), spread, len(values))

    @property
    def status(self) -> str:
        """``3 runs``, and what those that are not finished are at."""
        number = f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''}"
        others = [f"{run.state.value} at {run.step}/{run.steps}" for run in self.runs if not run.finished]
        return ", ".join([number, *others])


def compare(runs: Sequence[Run], group_by: Sequence[str] = (), *, mixed: bool = False) -> list[Group]:
    """``runs`` in groups, the one with the lowest validation loss first.

    ``group_by``: keys or group names (``optimizer`` is ``optimizer.name``); without any, runs are of one
    group where they differ in the seed alone. Raises UserError for runs whose validation losses mean
    different things, unless ``mixed``, which marks them; for a key that no run has; for no runs.
    """
    if not runs:
        raise UserError("there are no runs to compare")
    sets = _validation_sets(runs)
    if len(sets) > 1 and not mixed:
        raise UserError(_refusal(sets[0][0], sets[1][0]))
    keys = list(dict.fromkeys(_resolve(key, runs) for key in group_by))
    keys = keys or [key for key in differing_keys(runs) if key != REPLICATE_KEY]
    members: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        which = next(i for i, of_set in enumerate(sets) if run in of_set)
        members.setdefault((which, *_values(run, keys)), []).append(run)
    firsts = [of_group[0] for of_group in members.values()]
    labels = label_runs(firsts, keys)
    groups = []
    for (which, *_), label, of_group in zip(members, labels, members.values(), strict=True):
        varies = [k for k in differing_keys(of_group, BYTES_KEYS) if k != REPLICATE_KEY]
        mark = f"[{chr(ord('a') + which)}]" if len(sets) > 1 else ""
        if len(of_group) > 1 and label == of_group[0].name:
            label = _names(of_group) or label
        groups.append(Group(label, of_group, varies, mark))
    return sorted(groups, key=_rank)


def _rank(group: Group) -> tuple[str, bool, float, str]:
    loss = group.statistic(LOSS.metric)
    return (group.mark, not group.finished, loss.mean if loss else float("inf"), group.label)


def best_groups(groups: Sequence[Group], column: Column) -> list[Group]:
    """The groups that are best in ``column``: finished ones, and only where there are several of them.

    A group in which a run has failed, or a finished one has no figure, having diverged, is not the best.
    No peak of memory is the best of those of CPUs.
    No loss is the best of losses after different numbers of steps or tokens, or on different data.
    """
    statistics_of = [(g, g.statistic(column.metric)) for g in groups if g.finished and not g.failed]
    candidates = [(g, s.mean) for g, s in statistics_of if s is not None and s.number == len(g.finished)]
    if column.metric == PEAK and not peaks_compare(groups):
        return []
    is_loss = column.metric.startswith(("val/", "train/"))
    if (
        column.better is None
        or len(candidates) < 2
        or (is_loss and budgets_differ([g for g, _ in candidates]))
    ):
        return []
    best = column.better([mean for _, mean in candidates])
    tied = [group for group, mean in candidates if mean == best]
    return tied if len(tied) < len(candidates) else []


def peaks_compare(groups: Sequence[Group]) -> bool:
    """Whether peaks of memory tell methods apart: a GPU's allocator's do, a CPU's are the process's."""
    return all(group.statistic(ALLOCATED_ONLY) is not None for group in groups)


def budgets_differ(groups: Sequence[Group]) -> bool:
    """Whether their losses come after different numbers of steps or tokens, or of different data."""
    jobs = {
        (group.mark, run.steps, _hashable(run.config.get("batch_size")))
        for group in groups
        for run in group.finished
    }
    return len(jobs) > 1


def differing_keys(runs: Sequence[Run], also: Collection[str] = ()) -> list[str]:
    """The settings in which ``runs`` differ, in the order of their configuration.

    ``also``: operational keys, or groups of them, that count, too.
    """
    ignored = set(OPERATIONAL_KEYS) - set(also)
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if not is_among(key, ignored) and len(set(_values_of(runs, key))) > 1]


def is_among(key: str, keys: Collection[str]) -> bool:
    """Is a dotted key one of ``keys``, or in a group that is?"""
    return key in keys or key.split(".")[0] in keys


def label_runs(runs: Sequence[Run], keys: Sequence[str] | None = None) -> list[str]:
    """A label for each run: ``galore svd rank=64``, as short as tells them apart; else its name.

    ``keys``: the settings to tell them by; None: any, the seed last.
    """
    if keys is None:
        differing = differing_keys(runs)
        keys = [*(k for k in differing if k != REPLICATE_KEY), *(k for k in differing if k == REPLICATE_KEY)]
    names = [key for key in keys if key.endswith(".name")]
    others = [key for key in keys if not key.endswith(".name")]
    alike: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault(_values(run, names), []).append(run)
    labels = []
    for run in runs:
        telling = _told_apart_by(others, alike[_values(run, names)])
        parts = [short(run.config[key]) for key in names if run.config.get(key) not in (None, "none")]
        parts += [
            f"{short(k.split('.')[-1])}={short(run.config[k])}"
            for k in telling
            if run.config.get(k) is not None
        ]
        labels.append(" ".join(parts))
    return [
        run.name if not label or labels.count(label) > 1 else label
        for run, label in zip(runs, labels, strict=True)
    ]


def _names(runs: Sequence[Run]) -> str:
    """Model, optimizer and sampler, those that all have."""
    names = [set(_values_of(runs, f"{group}.name")) for group in ("model", "optimizer", "sampler")]
    return " ".join(short(*name) for name in names if len(name) == 1 and not name & {None, "none"})


def _told_apart_by(keys: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """All of ``keys`` in which ``runs`` differ; where these are many, as few as tell the runs apart."""
    differing = [key for key in keys if len(set(_values_of(runs, key))) > 1]
    return differing if len(differing) <= MOST_SETTINGS else _telling_keys(differing, runs)


def _telling_keys(keys: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """As few of ``keys`` as tell ``runs`` apart, the first ones preferred."""
    told: list[str] = []
    number = 1
    for key in keys:
        separated = len({_values(run, [*told, key]) for run in runs})
        if separated > number:
            told, number = [*told, key], separated
    return told


def _values(run: Run, keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(_hashable(run.config.get(key)) for key in keys)


def _values_of(runs: Sequence[Run], key: str) -> list[Any]:
    return [_hashable(run.config.get(key)) for run in runs]


def _resolve(key: str, runs: Sequence[Run]) -> str:
    known = dict.fromkeys(k for run in runs for k in run.config)
    for candidate in (key, f"{key}.name"):
        if candidate in known:
            return candidate
    raise UserError(f"--group-by {key}: no run has this setting{did_you_mean(key, list(known))}")


def _hashable(value: Any) -> Any:
    """``value`` for a comparison: a list, or a NaN, which is not equal to itself, as text."""
    return value if isinstance(value, str | int | None) else str(value)


def short(value: object) -> str:
    """A value within a label, which is to fit on a line: the middle of a long one is left out."""
    text = str(value)
    return (
        text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE // 2]}…{text[-LONGEST_VALUE // 2 :]}"
    )


# --- what a validation loss means --------------------------------------------------------------


def differences_of_sets(one: Run, other: Run) -> list[str]:
    """Why their validation losses mean different things, a clause each; empty where they do not.

    The fingerprints of data and tokenizer decide where both runs have one, since paths need not be equal;
    else the settings do.
    """
    keys = dict.fromkeys([*one.config, *other.config])
    differing = [k for k in keys if _hashable(one.config.get(k)) != _hashable(other.config.get(k))]
    read = [k for k in differing if k.startswith(("data.", "tokenizer.")) and k not in READING_KEYS]
    layout = [k for k in differing if k in LAYOUT_KEYS]
    if one.data_fingerprint is None or other.data_fingerprint is None:
        layout += [k for k in read if k not in layout]
    elif one.data_fingerprint != other.data_fingerprint:
        layout += [k for k in read if k not in layout]
        if not layout:
            return ["their data or tokenizer files are not the same"]
    return [f"{k} is {_show(one.config.get(k))} there and {_show(other.config.get(k))} here" for k in layout]


def _validation_sets(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose validation losses can be compared, together."""
    sets: list[list[Run]] = []
    for run in runs:
        fitting = next((of_set for of_set in sets if not differences_of_sets(of_set[0], run)), None)
        if fitting is None:
            sets.append([run])
        else:
            fitting.append(run)
    return sets


def comparable(runs: Sequence[Run], standard: Run) -> tuple[list[Run], list[str]]:
    """The runs whose validation losses can be compared with that of ``standard``; of each other why not."""
    kept, refused = [], []
    for run in runs:
        if differences := differences_of_sets(standard, run):
            refused.append(
                f"left out: {run.name}, whose validation loss cannot be compared with that of {standard.name}"
                f" ({differences[0]}; --mixed marks such runs)"
            )
        else:
            kept.append(run)
    return kept, refused


def _refusal(one: Run, other: Run) -> str:
    return (
        f"{one.name} and {other.name} cannot be compared by their validation losses:"
        f" {differences_of_sets(one, other)[0]}; leave one out, or mark them with --mixed"
    )


def _show(value: object) -> str:
    return Path(value).name if isinstance(value, str) and "/" in value else short(value)
