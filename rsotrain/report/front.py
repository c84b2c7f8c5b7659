"""Loss against optimizer state: what nothing smaller beats, and how sure a difference from Adam is."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsotrain.report.comparison import (
    COLUMNS,
    LOSS,
    PEAK,
    REPLICATE_KEY,
    Group,
    budgets_differ,
    differing_keys,
)
from rsotrain.report.evidence import OWN_KEYS, Interval, interval_of
from rsotrain.report.fairness import name_of
from rsotrain.report.runs import Run
from rsotrain.tracking.drawing import WIDTH, bytes_axis, label, look, new_figure
from rsotrain.tracking.escaping import for_csv, for_latex, for_markdown
from rsotrain.tracking.formats import format_bytes, format_seconds
from rsotrain.tracking.theme import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATE = "memory/optimizer_state_bytes"
FEWEST = 3  # groups, for a front to say something
BUDGETS = (0.12, 0.25, 0.5, 1.0)  # of Adam's state: those of experiment=track
HEIGHT = 4.6  # inches of the picture
NAME_SIZE = 9.5  # points
NOTE = (
    "On the Pareto front (•) no other has both less optimizer state and a lower loss. Intervals are 95 %"
    " confidence intervals of the mean over seeds (Student's t). p is that of a paired, two-sided t-test"
    " against Adam over shared seeds, not corrected for the number of comparisons. The wall time has"
    " refreshes in it."
)


@dataclass(frozen=True)
class Row:
    """A group in the front's table. ``share``: of Adam's state; ``p``: see ``NOTE``; None where unknown.

    ``index``: of the group among all, which has its colour.
    """

    group: Group
    index: int
    state_bytes: float
    share: float | None
    loss: Interval
    p: float | None
    on_front: bool


def front_of(groups: Sequence[Group]) -> list[Row]:
    """The finished groups by optimizer state, the largest first; empty where there is nothing to compare.

    That is so of losses after unequal steps or tokens or on unlike data, and of states that are all equal.
    A group of which a run has failed, or ended without a finite loss, is left out.
    """
    known = []
    for index, group in enumerate(groups):
        state, loss = group.statistic(STATE), group.statistic(LOSS.metric)
        if not group.finished or group.failed or state is None or loss is None:
            continue
        losses = [v for run in group.finished if (v := run.last(LOSS.metric)) is not None]
        if len(losses) == len(group.finished):
            known.append((index, group, state.mean, interval_of(losses)))
    states = {state for _, _, state, _ in known}
    if len(known) < FEWEST or len(states) < 2 or budgets_differ([group for _, group, _, _ in known]):
        return []
    adam = max(
        ((state, index, group) for index, group, state, _ in known if _method(group) == "adam"), default=None
    )
    rows = [
        Row(
            group,
            index,
            state,
            None if adam is None else state / adam[0],
            loss,
            None if adam is None or adam[1] == index else p_of_pairs(group.finished, adam[2].finished),
            on_front=not any(
                (other <= state and theirs.mean <= loss.mean) and (other, theirs.mean) != (state, loss.mean)
                for _, _, other, theirs in known
            ),
        )
        for index, group, state, loss in known
    ]
    return sorted(rows, key=lambda row: (-row.state_bytes, row.loss.mean))


def _method(group: Group) -> object:
    return group.runs[0].config.get("optimizer.name")


# --- the test --------------------------------------------------------------------------------------------


def p_of_pairs(ours: Sequence[Run], theirs: Sequence[Run]) -> float | None:
    """Two-sided p of the paired t-test on validation losses of the same seeds.

    None for fewer than two of them, for several runs of one seed, and for runs that differ in more than the
    method.
    """
    by_seed = [{run.config.get(REPLICATE_KEY, 0): run for run in runs} for runs in (ours, theirs)]
    shared = by_seed[0].keys() & by_seed[1].keys()
    runs = [of[seed] for of in by_seed for seed in shared]
    unlike = any(not key.startswith(OWN_KEYS) for key in differing_keys(runs))
    if len(shared) < 2 or unlike or [len(of) for of in by_seed] != [len(ours), len(theirs)]:
        return None
    pairs = [[of[seed].last(LOSS.metric) for of in by_seed] for seed in shared]
    return p_of_differences([a - b for a, b in pairs if a is not None and b is not None])


def p_of_differences(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test that their mean is 0; None for fewer than two."""
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return student_p(mean / (spread / math.sqrt(len(differences))), len(differences) - 1)


def student_p(t: float, freedom: int) -> float:
    """The chance of so large a |t|, or a larger one, with ``freedom`` degrees of freedom, at least one.

    Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum of powers of cos θ, tan θ = t/√ν.
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    cosine, odd = math.cos(theta), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + inside)
    return min(1.0, max(0.0, 1.0 - inside))


# --- the tables ------------------------------------------------------------------------------------------

HEADS = ("optimizer state", "of Adam's", "validation loss, 95 % interval", "seeds", "p against Adam")
MEASURED = (PEAK, "time")


def _cells(row: Row) -> list[str]:
    """The texts of a row behind the group's name."""
    margin = "" if row.loss.margin is None else f" ± {LOSS.form(row.loss.margin)}"
    share = "–" if row.share is None else f"{100 * row.share:.1f} %"
    cells = [format_bytes(row.state_bytes), share, LOSS.form(row.loss.mean) + margin, str(row.loss.number)]
    cells.append("–" if row.p is None else f"{row.p:.3f}" if row.p >= 0.001 else "< 0.001")
    for metric in MEASURED:
        statistic = row.group.statistic(metric)
        form = format_seconds if metric == "time" else format_bytes
        cells.append("–" if statistic is None else form(statistic.mean))
    return cells


def _heads() -> list[str]:
    names = {column.metric: column.label for column in COLUMNS}
    return [*HEADS, *(names[metric] for metric in MEASURED)]


def front_cells(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """Heads and rows of the table, for a page."""
    return _heads(), [(row, _cells(row)) for row in rows]


def front_markdown(rows: Sequence[Row]) -> str:
    lines = [f"| | {' | '.join(_heads())} |", "|---" * (len(_heads()) + 1) + "|"]
    for row in rows:
        name = for_markdown(name_of(row.group))
        cells = " | ".join(map(for_markdown, _cells(row)))
        lines.append(f"| {f'• **{name}**' if row.on_front else name} | {cells} |")
    return "\n".join(lines)


def front_latex(rows: Sequence[Row]) -> str:
    r"""A ``tabular`` for ``booktabs``; the front's names are bold."""
    heads = " & ".join(["", *map(for_latex, _heads())])
    lines = [rf"\begin{{tabular}}{{l{'r' * len(_heads())}}}", r"\toprule", rf"{heads} \\", r"\midrule"]
    for row in rows:
        name = for_latex(name_of(row.group))
        cells = [rf"\textbf{{{name}}}" if row.on_front else name, *map(for_latex, _cells(row))]
        lines.append(rf"{' & '.join(cells)} \\")
    comment = "% needs \\usepackage{booktabs}; bold: on the Pareto front of loss and optimizer state"
    return "\n".join([comment, *lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def front_csv(rows: Sequence[Row]) -> str:
    """Full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [
        "group",
        STATE,
        "share of adam",
        LOSS.metric,
        "95 % margin",
        "seeds",
        "p against adam",
        "on front",
    ]
    writer.writerow([*heads, *MEASURED])
    for row in rows:
        measured = [row.group.statistic(metric) for metric in MEASURED]
        writer.writerow(
            [
                for_csv(name_of(row.group)), row.state_bytes, row.share, row.loss.mean, row.loss.margin,
                row.loss.number, row.p, int(row.on_front), *(s.mean if s else None for s in measured),
            ]
        )  # fmt: skip
    return text.getvalue()


# --- the picture -----------------------------------------------------------------------------------------


def front_picture(rows: Sequence[Row], palette: Palette) -> "Figure":
    """Loss over optimizer state: a point a group with its interval, a line of steps through the front.

    A point bears the name of its method; the rest of what it is stands in the table.
    """
    figure = new_figure(HEIGHT)
    panel = figure.subplots()
    front = sorted((row.state_bytes, row.loss.mean) for row in rows if row.on_front)
    right = 1.1 * max(row.state_bytes for row in rows)
    xs, ys = [*(x for x, _ in front), right], [*(y for _, y in front), front[-1][1]]
    panel.plot(xs, ys, drawstyle="steps-post", color=palette.muted, linewidth=1.2, zorder=1)
    for row in rows:
        color, place = look(row.index, palette)["color"], (row.state_bytes, row.loss.mean)
        if row.loss.margin:
            panel.errorbar(*place, yerr=row.loss.margin, color=color, elinewidth=1.2, capsize=2.5)
        filled = color if row.on_front else palette.surface
        marker: dict[str, Any] = {"marker": "o", "markersize": 7} if row.on_front else {"marker": "D"}
        panel.plot(*place, color=color, markerfacecolor=filled, markeredgewidth=1.6, **marker)
    whole = next((row.state_bytes / row.share for row in rows if row.share), None)
    if whole is not None:  # budgets, named on top
        above = panel.secondary_xaxis("top")
        shares = (0.0, *BUDGETS)
        above.set_xticks([share * whole for share in shares], [f"{100 * share:g} %" for share in shares])
        above.set_xlabel("of Adam's optimizer state")
        above.spines["top"].set_visible(False)
        for share in shares:
            panel.axvline(share * whole, color=palette.grid, linewidth=0.8, zorder=0)
        panel.grid(visible=False, axis="x")
    panel.set_xlim(-0.02 * right, right)
    panel.set_xlabel("optimizer state")
    bytes_axis(panel, right)
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_ylim(*_limits(rows))
    _name_points(panel, rows, palette)
    return figure


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """All intervals, but for bad methods, which would flatten the others."""
    low = min(row.loss.mean - (row.loss.margin or 0.0) for row in rows)
    means = sorted(row.loss.mean for row in rows)
    usual = means[int(0.8 * (len(means) - 1))]
    shown = [row for row in rows if row.loss.mean <= usual + 1.5 * (usual - means[0])]
    high = max(row.loss.mean + min(row.loss.margin or 0.0, 1.5 * (usual - means[0])) for row in shown)
    low = max(low, means[0] - 1.5 * (usual - means[0]))  # of two seeds the interval may be wide
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _name_points(panel: "Axes", rows: Sequence[Row], palette: Palette) -> None:
    """The method's name right of each point, lower where another name is in the way.

    What lies above the picture is named at its upper end, with its loss.
    """
    (low, high), (left, right) = panel.get_ylim(), panel.get_xlim()
    width, height = 0.82 * 72 * WIDTH, 0.68 * 72 * HEIGHT  # of the panel, about, in points
    placed: list[tuple[float, float, float]] = []  # begin and end of a name, and its height
    for row in sorted(rows, key=lambda row: -row.loss.mean):
        name = label(str(_method(row.group) or name_of(row.group)), 16, 1)
        inside = row.loss.mean <= high
        text = name if inside else f"{name} {LOSS.form(row.loss.mean)} ↑"
        x = (row.state_bytes - left) / (right - left) * width + 7
        y = (min(row.loss.mean, high) - low) / (high - low) * height - (0 if inside else 5)
        y -= 8 if row.on_front and inside else 0  # below the line of the front
        end = x + 0.56 * NAME_SIZE * len(text)
        if end > width:  # on the other side of its point
            x, end = x - 14 - (end - x), x - 14
        while any(x < b and a < end and abs(y - other) < NAME_SIZE for a, b, other in placed):
            y -= 1
        placed.append((x, end, y))
        panel.annotate(
            text, (x / width, y / height), xycoords="axes fraction", va="center", fontsize=NAME_SIZE,
            color=palette.ink if row.on_front else palette.muted,
        )  # fmt: skip
