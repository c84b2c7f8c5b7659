"""Lines over tokens, steps or time: one for each group, the mean of its finished runs."""

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rsotrain.report.comparison import Group
from rsotrain.report.fairness import name_of
from rsotrain.tracking.drawing import count_tick, label, look, new_figure, seconds_tick
from rsotrain.tracking.theme import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LEGEND_WIDTH = 34  # characters


class Axis(NamedTuple):
    """``column``: in the points of ``Run.series``."""

    name: str
    label: str
    column: int
    form: Callable[[float], str]


AXES = (
    Axis("tokens", "tokens", 1, count_tick),
    Axis("steps", "steps", 0, count_tick),
    Axis("time", "wall time", 2, seconds_tick),
)


def curves(
    groups: Sequence[Group],
    panels: Sequence[tuple[str, str]],
    axis: Axis,
    palette: Palette,
    *,
    shown: Sequence[Group] | None = None,
    stairs: bool = False,
) -> "Figure":
    """A panel a metric, in it one line a group, over thin lines of its runs.

    The line is the mean of the finished runs, of all while none is. ``stairs``: what is logged holds until
    it changes.
    """
    shown = groups if shown is None else shown
    names = [label(name_of(group), LEGEND_WIDTH, 4) for group in shown]
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    columns = 3 if longest <= 12 else 2 if longest <= 24 else 1
    rows = -(-len(names) // columns) * max((1 + name.count("\n") for name in names), default=1)
    figure = new_figure(3.4 * len(panels) + 0.5 + 0.24 * rows)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    handles: list[Line2D] = []
    for panel, (metric, quantity) in zip(axes, panels, strict=True):
        handles = []
        for index, group in enumerate(groups):
            if group in shown:
                style = look(index, palette) | ({"drawstyle": "steps-post"} if stairs else {})
                handles.append(_draw_group(panel, group, metric, axis, style))
        panel.set_ylabel(quantity)
        panel.set_xlabel(axis.label)
        panel.xaxis.set_major_formatter(axis.form)
        panel.set_xlim(left=0)
        panel.grid(visible=False, axis="x")
        if all(len(line.get_xdata()) < 2 for line in panel.get_lines()):
            # points alone: an axis that spans no more than their differences would blow these up
            panel.set_ylim(0, 1.1 * max([1e-9, *(y for line in panel.get_lines() for y in line.get_ydata())]))
        elif (top := _top([line.get_ydata() for line in panel.get_lines()])) is not None:
            panel.set_ylim(top=top)
    # not by the labels of the lines: matplotlib leaves out those that begin with an underscore
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, handlelength=2.6, labelspacing=0.4
    )
    return figure


def _draw_group(panel: "Axes", group: Group, metric: str, axis: Axis, style: dict[str, Any]) -> "Line2D":
    """The thin lines of the runs and the group's own, which is returned."""
    series = [(run.finished, points) for run in group.runs if (points := run.series(metric))]
    if len(series) > 1:
        for _, points in series:
            panel.plot(*_xy(points, axis), linewidth=0.8, alpha=0.45, **style)
    ends = any(finished for finished, _ in series)
    by_step = [{point[0]: point for point in points} for finished, points in series if finished or not ends]
    shared = sorted(set.intersection(*map(set, by_step))) if by_step else []
    means = [
        tuple(statistics.fmean(column) for column in zip(*(points[step] for points in by_step), strict=True))
        for step in shared
    ]
    marker = "o" if len(means) < 12 and "drawstyle" not in style else None
    (line,) = panel.plot(*_xy(means, axis), marker=marker, markersize=4.5, **style)
    return line


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
