"""Horizontal bars: bytes by part, throughput."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rsotrain.report.comparison import THROUGHPUT, Group
from rsotrain.report.tables import name_of
from rsotrain.tracking.display import format_bytes
from rsotrain.tracking.drawing import bytes_tick, count_tick, drawing_in, import_matplotlib, look, new_figure
from rsotrain.tracking.theme import LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEMORY_PARTS = ("parameters", "gradients", "optimizer_state", "saved_activations")


def memory_bars(groups: Sequence[Group], palette: Palette) -> "Figure":
    """Parameters, gradients, optimizer state and saved activations of each group that has such figures."""
    metrics = {part.replace("_", " "): f"memory/{part}_bytes" for part in MEMORY_PARTS}
    known = [group for group in groups if any(mean_of(group, metric) for metric in metrics.values())]
    parts = {part: [mean_of(group, metric) or 0.0 for group in known] for part, metric in metrics.items()}
    return stacked_bytes([name_of(group) for group in known], parts, palette)


def stacked_bytes(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], palette: Palette = LIGHT
) -> "Figure":
    """A horizontal bar of bytes for each name, the first on top, made of ``parts``; at least one byte."""
    import_matplotlib()
    from matplotlib.ticker import MultipleLocator

    with drawing_in(palette):
        figure, panel, places = _bars(names, palette)
        left = [0.0] * len(names)
        for (part, widths), color in zip(parts.items(), palette.parts, strict=False):
            panel.barh(
                places, widths, left=left, height=0.62, color=color, edgecolor=palette.surface, linewidth=1.2,
                label=part,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in zip(places, left, strict=True):
            panel.annotate(
                format_bytes(total), (total, place), (5, 0), textcoords="offset points", va="center"
            )
        panel.set_xlim(right=1.12 * max(left))
        unit = 1024 ** min(4, int(math.log(max(left), 1024)))
        panel.xaxis.set_major_locator(MultipleLocator(_round_step(max(left) / unit) * unit))
        panel.xaxis.set_major_formatter(bytes_tick)
        figure.legend(loc="outside upper left", ncols=len(parts), handlelength=1.0, handleheight=1.0)
    return figure


def throughput_bars(groups: Sequence[Group], palette: Palette) -> "Figure":
    """Tokens per second of each group, and their spread."""
    figure, panel, places = _bars([name_of(group) for group in groups], palette)
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


def _bars(names: Sequence[str], palette: Palette) -> tuple["Figure", "Axes", list[int]]:
    """An empty picture of horizontal bars, the first name on top."""
    figure = new_figure(0.36 * len(names) + 1.25)
    panel = figure.subplots()
    places = list(range(len(names)))
    panel.set_yticks(places, names, color=palette.ink)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    return figure, panel, places


def _round_step(length: float) -> float:
    """1, 2 or 5 times a power of ten, so that at most ten steps fill ``length``."""
    power = 10.0 ** math.floor(math.log10(length / 10))
    return next(factor * power for factor in (1, 2, 5, 10) if 10 * factor * power >= length)
