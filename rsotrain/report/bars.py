"""Horizontal bars: bytes by part, throughput."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsotrain.report.comparison import THROUGHPUT, Group
from rsotrain.report.fairness import name_of
from rsotrain.tracking.drawing import (
    count_tick,
    horizontal_bars,
    look,
    stacked_bytes,
)
from rsotrain.tracking.theme import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY_PARTS = ("parameters", "gradients", "optimizer_state", "saved_activations")


def memory_bars(groups: Sequence[Group], palette: Palette) -> "Figure":
    """Parameters, gradients, optimizer state and saved activations of each group that has such figures."""
    metrics = {part.replace("_", " "): f"memory/{part}_bytes" for part in MEMORY_PARTS}
    known = [group for group in groups if any(mean_of(group, metric) for metric in metrics.values())]
    parts = {part: [mean_of(group, metric) or 0.0 for group in known] for part, metric in metrics.items()}
    return stacked_bytes([name_of(group) for group in known], parts, palette)


def throughput_bars(groups: Sequence[Group], palette: Palette) -> "Figure":
    """Tokens per second of each group, and their spread."""
    figure, panel, places = horizontal_bars([name_of(group) for group in groups], palette)
    statistics_of = [group.statistic(THROUGHPUT.metric) for group in groups]
    for index, statistic in enumerate(statistics_of):
        if statistic is None:
            continue
        panel.barh(places[index], statistic.mean, height=0.62, color=look(index, palette)["color"])
        spread = statistic.spread or 0.0
        if spread:
            panel.errorbar(
                statistic.mean, places[index], xerr=spread, color=palette.ink, linewidth=1.2, capsize=2.5
            )
        panel.annotate(
            statistic.show(THROUGHPUT),
            (statistic.mean + spread, places[index]),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    longest = max(s.mean + (s.spread or 0.0) for s in statistics_of if s is not None)
    panel.set_xlim(0, 1.18 * longest)
    panel.set_xlabel("tokens per second")
    panel.xaxis.set_major_formatter(count_tick)
    return figure


def mean_of(group: Group, metric: str) -> float | None:
    statistic = group.statistic(metric)
    return None if statistic is None else statistic.mean
