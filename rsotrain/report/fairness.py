"""Why a comparison may not be fair: a short sentence each, for the page and the terminal."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rsotrain.config.identity import OPERATIONAL_KEYS
from rsotrain.report.comparison import LOSS, REPLICATE_KEY, Group, differences_of_sets, is_among
from rsotrain.report.records import number_of
from rsotrain.tracking.formats import format_count

RATE_KEYS = ("optimizer.scale", "optimizer.lr")  # of the blocks, and of everything
SLACK = 0.001  # of the tokens: the last batch of an epoch may be shorter
MOST_NAMES = 4  # of groups in a sentence


def doubts(groups: Sequence[Group]) -> list[str]:
    """What makes a difference between ``groups`` something else than one between methods."""
    if len(groups) < 2:
        return []
    return [
        *_of_validation(groups),
        *_of_precision(groups),
        *_of_tokens(groups),
        *_of_rates(groups),
        *_of_seeds(groups),
    ]


def name_of(group: Group) -> str:
    return f"{group.label} {group.mark}".strip()


def listed(names: Sequence[str], number: int = 8) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def _of_validation(groups: Sequence[Group]) -> Iterator[str]:
    firsts = {group.mark: group.runs[0] for group in groups if group.mark}
    one, *others = sorted(firsts) or [""]
    for other in others:
        yield (
            f"Losses of {one} and {other} mean different things:"
            f" {differences_of_sets(firsts[one], firsts[other])[0]}."
        )


def _of_precision(groups: Sequence[Group]) -> Iterator[str]:
    of_precision: dict[Any, list[str]] = {}
    for group in groups:
        for precision in dict.fromkeys(str(run.config.get("precision")) for run in group.runs):
            of_precision.setdefault(precision, []).append(name_of(group))
    if len(of_precision) > 1:
        shown = "; ".join(f"{key}: {listed(names, MOST_NAMES)}" for key, names in of_precision.items())
        yield f"Their precision differs ({shown})."


def _of_tokens(groups: Sequence[Group]) -> Iterator[str]:
    """Of those with the same validation data: what others have seen does not matter."""
    for mark in dict.fromkeys(group.mark for group in groups):
        of_group = {
            name_of(group): statistic.mean
            for group in groups
            if group.mark == mark and group.finished and (statistic := group.statistic("tokens")) is not None
        }
        if not of_group:
            continue
        least, most = min(of_group, key=of_group.__getitem__), max(of_group, key=of_group.__getitem__)
        if of_group[most] > (1 + SLACK) * of_group[least]:
            yield (
                f"Unequal tokens: {format_count(of_group[least])} for {least},"
                f" {format_count(of_group[most])} for {most}."
            )


def _of_seeds(groups: Sequence[Group]) -> Iterator[str]:
    alone = [
        name_of(group)
        for group in groups
        if group.finished and len({str(run.config.get(REPLICATE_KEY)) for run in group.finished}) == 1
    ]
    if alone:
        whose = "each" if len(alone) == len(groups) else f"of {listed(alone, MOST_NAMES)}"
        yield f"One seed {whose}: a difference may be chance."


def _of_rates(groups: Sequence[Group]) -> Iterator[str]:
    """Of each method's best group, whether its rate is the smallest or largest of several that were tried."""
    methods: dict[Any, list[Group]] = {}
    for group in groups:
        methods.setdefault(_setting(group, ("optimizer.lr", "optimizer.scale")), []).append(group)
    for of_method in methods.values():
        best = min(of_method, key=_loss)
        if not math.isfinite(_loss(best)):
            continue
        for key in RATE_KEYS:
            rate, own = number_of(best.runs[0].config.get(key)), _setting(best, (key,))
            family = [group for group in of_method if _setting(group, (key,)) == own]
            tried = {r for group in family if (r := number_of(group.runs[0].config.get(key))) is not None}
            if len(tried) > 1 and key not in best.varies and rate in (min(tried), max(tried)):
                end = "smallest" if rate == min(tried) else "largest"
                said = f"The {key} of {name_of(best)} is the {end} that was tried"
                yield f"{said}, and a better one may lie beyond."


def _loss(group: Group) -> float:
    """Infinite where no run has finished with one: a rate that diverges was tried, too."""
    statistic = group.statistic(LOSS.metric) if group.finished and not group.failed else None
    return math.inf if statistic is None else statistic.mean


def _setting(group: Group, without: Sequence[str]) -> tuple[Any, ...]:
    """All that makes the group what it is but the seed and the keys ``without``, for a comparison."""
    left_out = {*OPERATIONAL_KEYS, *without, REPLICATE_KEY}
    settings = group.runs[0].config.items()
    return (
        group.mark,
        *((key, str(value)) for key, value in sorted(settings) if not is_among(key, left_out)),
    )
