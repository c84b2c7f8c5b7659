"""The pictures of a report, drawn with matplotlib in the colours of ``theme``."""

import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rsotrain.display import format_bytes, format_count, format_seconds
from rsotrain.errors import UserError
from rsotrain.report.comparison import THROUGHPUT, Group
from rsotrain.report.tables import name_of
from rsotrain.report.theme import GRID, INK, MUTED, PARTS, SERIES, SURFACE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6  # inches
LEGEND_WIDTH = 28  # characters
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # more groups than colours
MEMORY_PARTS = ("parameters", "gradients", "optimizer_state", "saved_activations")


class Axis(NamedTuple):
    """``column``: in the points of ``Run.series``."""

    name: str
    label: str
    column: int
    form: Callable[[float], str]


def _round(count: float, _: float = 0) -> str:
    """A tick's count: 500, 1.5k, 20k."""
    return _without_zeros(format_count(count)) if count else "0"


def _bytes(count: float, _: float = 0) -> str:
    return _without_zeros(format_bytes(count)) if count else "0"


def _without_zeros(text: str) -> str:
    """``1.50k`` as ``1.5k``, ``20.0 MiB`` as ``20 MiB``."""
    return re.sub(r"\.(\d*?)0+(?=\D|$)", lambda match: f".{match[1]}" if match[1] else "", text)


def _seconds(seconds: float, _: float = 0) -> str:
    return format_seconds(seconds) if seconds else "0"


AXES = (
    Axis("tokens", "tokens", 1, _round),
    Axis("steps", "steps", 0, _round),
    Axis("time", "wall time", 2, _seconds),
)


def import_matplotlib() -> None:
    """Raise UserError where matplotlib is missing; it is an extra, since training needs no pictures."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'rsotrain[report]'") from error


def draw(groups: Sequence[Group]) -> dict[str, "Figure"]:
    """File name -> picture, of what the runs have recorded, in the order of a page."""
    import_matplotlib()
    import matplotlib

    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(_STYLE):
        for metric, name, label in (
            ("val/loss", "validation_loss", "validation loss (nats per token)"),
            ("train/loss", "training_loss", "training loss (nats per token)"),
        ):
            if _has(groups, metric):
                for axis in AXES:
                    figures[f"{name}_by_{axis.name}"] = _curves(groups, [(metric, label)], axis)
        if any(_mean(group, "memory/parameters_bytes") for group in groups):
            figures["memory"] = _memory(groups)
        if any(_mean(group, THROUGHPUT.metric) for group in groups):
            figures["throughput"] = _throughput(groups)
        subspace = [
            ("subspace/overlap", "overlap with the basis before"),
            ("subspace/captured_energy", "captured share of the energy"),
        ]
        if panels := [(metric, label) for metric, label in subspace if _has(groups, metric)]:
            seen = [group for group in groups if any(_has([group], metric) for metric, _ in panels)]
            figures["subspace"] = _curves(groups, panels, AXES[1], shown=seen)
    return figures


def svg_text(name: str, figure: "Figure") -> str:
    """The picture as an SVG element; the same runs give the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor=SURFACE, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_png(figure: "Figure", path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, dpi=160, facecolor=SURFACE)


_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "svg.fonttype": "none",  # text stays text
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def _has(groups: Sequence[Group], metric: str) -> bool:
    return any(run.series(metric) for group in groups for run in group.runs)


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def _look(index: int) -> dict[str, Any]:
    """Colour first; where there are more groups than colours, the dashes tell."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index // len(SERIES) % len(DASHES)]}


def _curves(
    groups: Sequence[Group],
    panels: Sequence[tuple[str, str]],
    axis: Axis,
    *,
    shown: Sequence[Group] | None = None,
) -> "Figure":
    """One line a group, the mean of its runs, over thin lines of these; a panel a metric."""
    shown = groups if shown is None else shown
    lines = sum(len(textwrap.wrap(name_of(group), LEGEND_WIDTH)) for group in shown)
    figure = _figure(max(3.9, 0.2 * lines + 0.9))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (metric, label) in zip(axes, panels, strict=True):
        for index, group in enumerate(groups):
            if group in shown:
                _draw_group(panel, group, metric, axis, _look(index))
        panel.set_ylabel(label)
        panel.set_xlabel(axis.label)
        panel.xaxis.set_major_formatter(axis.form)
        panel.set_xlim(left=0)
        panel.grid(visible=False, axis="x")
        if (top := _top([line.get_ydata() for line in panel.get_lines()])) is not None:
            panel.set_ylim(top=top)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=2.2, labelspacing=0.45)
    return figure


def _draw_group(panel: "Axes", group: Group, metric: str, axis: Axis, look: dict[str, Any]) -> None:
    series = [points for run in group.runs if (points := run.series(metric))]
    if len(series) > 1:
        for points in series:
            panel.plot(*_xy(points, axis), linewidth=0.8, alpha=0.45, **look)
    by_step = [{point[0]: point for point in points} for points in series]
    shared = sorted(set.intersection(*map(set, by_step))) if by_step else []
    means = [
        tuple(statistics.fmean(column) for column in zip(*(points[step] for points in by_step), strict=True))
        for step in shared
    ]
    panel.plot(
        *_xy(means, axis),
        marker="o" if len(means) < 12 else None,
        markersize=4.5,
        label=textwrap.fill(name_of(group), LEGEND_WIDTH),
        **look,
    )


def _xy(points: Sequence[tuple[float, ...]], axis: Axis) -> tuple[list[float], list[float]]:
    return [point[axis.column] for point in points], [point[3] for point in points]


def _top(lines: Sequence[Sequence[float]]) -> float | None:
    """Where to cut the picture, so that first steps or a diverged run do not flatten the rest."""
    values = sorted(value for line in lines for value in line)
    if len(values) < 8:
        return None
    low, upper = values[0], values[int(0.9 * len(values))]
    margin = 0.15 * (upper - low)
    return upper + margin if values[-1] > upper + 2 * margin else None


def _bars(names: Sequence[str]) -> tuple["Figure", "Axes", list[int]]:
    """An empty picture of horizontal bars, the first name on top."""
    figure = _figure(0.36 * len(names) + 1.25)
    panel = figure.subplots()
    places = list(range(len(names)))
    panel.set_yticks(places, names, color=INK)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    return figure, panel, places


def _memory(groups: Sequence[Group]) -> "Figure":
    parts = {
        part.replace("_", " "): [_mean(group, f"memory/{part}_bytes") or 0.0 for group in groups]
        for part in MEMORY_PARTS
    }
    return stacked_bytes([name_of(group) for group in groups], parts)


def stacked_bytes(names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> "Figure":
    """A horizontal bar of bytes for each name, the first on top, made of ``parts``; at least one byte."""
    import_matplotlib()
    import matplotlib
    from matplotlib.ticker import MultipleLocator

    with matplotlib.rc_context(_STYLE):
        figure, panel, places = _bars(names)
        left = [0.0] * len(names)
        for (part, widths), color in zip(parts.items(), PARTS, strict=False):
            panel.barh(
                places, widths, left=left, height=0.62, color=color, edgecolor=SURFACE, linewidth=1.2,
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
        panel.xaxis.set_major_formatter(_bytes)
        figure.legend(loc="outside upper left", ncols=len(parts), handlelength=1.0, handleheight=1.0)
    return figure


def _round_step(length: float) -> float:
    """1, 2 or 5 times a power of ten, so that at most ten steps fill ``length``."""
    power = 10.0 ** math.floor(math.log10(length / 10))
    return next(factor * power for factor in (1, 2, 5, 10) if 10 * factor * power >= length)


def _throughput(groups: Sequence[Group]) -> "Figure":
    figure, panel, places = _bars([name_of(group) for group in groups])
    statistics_of = [group.statistic(THROUGHPUT.metric) for group in groups]
    for index, statistic in enumerate(statistics_of):
        if statistic is None:
            continue
        panel.barh(places[index], statistic.mean, height=0.62, color=SERIES[index % len(SERIES)])
        spread = statistic.spread or 0.0
        if spread:
            panel.errorbar(statistic.mean, places[index], xerr=spread, color=INK, linewidth=1.2, capsize=2.5)
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
    panel.xaxis.set_major_formatter(_round)
    return figure


def _mean(group: Group, metric: str) -> float | None:
    statistic = group.statistic(metric)
    return None if statistic is None else statistic.mean
