"""The comparison as Markdown, CSV and a table on the screen."""

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsotrain.report.claims import Finding
from rsotrain.report.comparison import (
    BYTES_KEYS,
    COLUMNS,
    LOSS,
    PEAK,
    REPLICATE_KEY,
    Column,
    Group,
    best_groups,
    budgets_differ,
    differing_keys,
    peaks_compare,
)
from rsotrain.report.evidence import Verdict
from rsotrain.report.fairness import doubts, listed, name_of
from rsotrain.tracking.display import titled_table
from rsotrain.tracking.escaping import for_csv, for_markdown

if TYPE_CHECKING:
    from rich.table import Table


def columns_of(groups: Sequence[Group]) -> list[Column]:
    """The columns that some group has a figure for."""
    return [c for c in COLUMNS if any(group.statistic(c.metric) for group in groups)]


def rows(groups: Sequence[Group]) -> list[tuple[Group, list[tuple[str, bool]]]]:
    """Of each group the text of each column, and whether it is the best there."""
    columns = columns_of(groups)
    best = {column.metric: best_groups(groups, column) for column in columns}
    out = []
    for group in groups:
        cells = []
        for column in columns:
            statistic = group.statistic(column.metric)
            text = "–" if statistic is None else statistic.show(column)
            cells.append((text, any(group is b for b in best[column.metric])))
        out.append((group, cells))
    return out


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader must know to read the table right, a sentence each."""
    said = []
    if any(len(group.finished) > 1 for group in groups):
        said.append("± is the standard deviation over the runs of a group.")
    if any(0 < len(group.finished) < len(group.runs) for group in groups):
        said.append("Only finished runs count in a group that has some.")
    if any(group.statistic(PEAK) for group in groups) and not peaks_compare(groups):
        said.append("On a CPU peak memory is the whole process's, Python and libraries in it: no best.")
    for group in groups:
        statistic = group.statistic(LOSS.metric)
        if statistic is not None and (without := len(group.finished) - statistic.number) > 0:
            said.append(f"{without} of the finished runs of {name_of(group)} ended without a finite loss.")
        if group.varies:
            said.append(f"The runs of {name_of(group)} differ in {listed(group.varies)}, too.")
    firsts = [group.runs[0] for group in groups]
    if between := [k for k in differing_keys(firsts, BYTES_KEYS) if k.split(".")[0] in BYTES_KEYS]:
        said.append(f"Groups differ in {listed(between)}, on which bytes and tokens/s depend.")
    if budgets_differ(groups) and len({group.mark for group in groups}) == 1:
        said.append("No loss is the best, since they come after different numbers of steps or tokens.")
    return said


def markdown(groups: Sequence[Group]) -> str:
    """A Markdown table, best figures bold, and its notes."""
    columns = columns_of(groups)
    lines = ["| | " + " | ".join(c.label for c in columns) + " | runs |", "|---" * (len(columns) + 2) + "|"]
    for group, cells in rows(groups):
        texts = [f"**{text}**" if is_best else text for text, is_best in cells]
        lines.append(f"| {for_markdown(name_of(group))} | " + " | ".join(texts) + f" | {group.status} |")
    said = [*notes(groups), *(f"- {sentence}" for sentence in doubts(groups))]
    return "\n".join([*lines, "", *map(for_markdown, said)]).rstrip() + "\n"


def comma_separated(groups: Sequence[Group]) -> str:
    """Full precision: for each metric its mean, its standard deviation and whether it is the best."""
    columns = columns_of(groups)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{c.metric}{suffix}" for c in columns for suffix in ("", " spread", " best")]
    writer.writerow(["group", "validation data", "runs", "finished", *parts])
    for group, cells in rows(groups):
        figures: list[object] = []
        for column, (_, is_best) in zip(columns, cells, strict=True):
            statistic = group.statistic(column.metric)
            mean, spread = (statistic.mean, statistic.spread) if statistic else (None, None)
            figures += [mean, spread, int(is_best)]
        writer.writerow([for_csv(group.label), group.mark, len(group.runs), len(group.finished), *figures])
    return text.getvalue()


def run_list(groups: Sequence[Group]) -> str:
    """CSV, a line for each run: its group and state, the settings in which runs differ, its last figures."""
    columns = columns_of(groups)
    runs = [(group, run) for group in groups for run in group.runs]
    keys = [key for key in differing_keys([run for _, run in runs], BYTES_KEYS) if key != REPLICATE_KEY]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "group", "state", "step", REPLICATE_KEY, *keys, *(c.metric for c in columns)])
    names = [run.name for _, run in runs]
    for group, run in runs:
        name = run.name if names.count(run.name) == 1 else f"{run.path.parent.name}/{run.name}"
        values = [run.config.get(key) for key in (REPLICATE_KEY, *keys)]
        settings = ["" if value is None else for_csv(str(value)) for value in values]
        figures = [run.last(column.metric) for column in columns]
        writer.writerow(
            [for_csv(name), for_csv(name_of(group)), run.state.value, run.step, *settings, *figures]
        )
    return text.getvalue()


# Of a table on the screen: metric -> heading. A wide terminal has all, a narrow one the first of these.
SCREEN = {
    "val/loss": "val loss",
    "memory/optimizer_state_bytes": "state",
    "memory/peak_bytes": "memory",
    "throughput/tokens_per_second": "tok/s",
    "val/perplexity": "perplexity",
    "time": "time",
}
VERDICT_STYLES = {Verdict.confirmed: "green", Verdict.refuted: "red", Verdict.undecided: "dim"}
LABEL_WIDTH = 36  # columns that labels and states have at least before figures are left out


def screen(groups: Sequence[Group], width: int, title: str = "Comparison") -> "Table":
    """A rich table for ``width`` columns of a terminal; best figures bold and green."""
    from rich.cells import cell_len
    from rich.text import Text

    columns, lines = columns_of(groups), rows(groups)
    shown = [i for i, column in enumerate(columns) if column.metric in SCREEN]
    widths = {i: max(cell_len(cells[i][0]) for _, cells in lines) for i in shown}
    widths = {i: max(w, len(SCREEN[columns[i].metric])) + 3 for i, w in widths.items()}
    labels = max(len(name_of(g)) for g in groups) + max(len(g.status) for g in groups) + 7
    while len(shown) > 1 and sum(widths[i] for i in shown) + min(labels, LABEL_WIDTH) > width:
        shown.remove(max(shown, key=lambda i: list(SCREEN).index(columns[i].metric)))
    table = titled_table(title)
    table.add_column("", style="bold", overflow="fold")
    for i in shown:
        table.add_column(SCREEN[columns[i].metric], justify="right", no_wrap=True)
    table.add_column("runs", justify="right")
    for group, cells in lines:
        texts = [Text(cells[i][0], style="bold green" if cells[i][1] else "") for i in shown]
        table.add_row(name_of(group), *texts, group.status)
    return table


def claims_screen(findings: Sequence[Finding]) -> "Table":
    """A rich table: each claim and its verdict; the figures are in the report."""
    from rich.text import Text

    table = titled_table("The papers' claims")
    table.add_column("", overflow="fold")
    table.add_column("", no_wrap=True)
    table.show_header = False
    for number, finding in enumerate(findings, start=1):
        style = VERDICT_STYLES[finding.verdict]
        table.add_row(f"{number}. {finding.claim}", Text(finding.verdict.value, style=style))
    return table
