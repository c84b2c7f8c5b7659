"""``--live``: the runs of a sweep in a table that follows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rsotrain.report.comparison import LOSS, THROUGHPUT, comparable, compare, label_runs
from rsotrain.report.runs import Run
from rsotrain.report.watching import Told, looks
from rsotrain.report.writing import print_comparison
from rsotrain.tracking.display import titled_table
from rsotrain.tracking.formats import format_count, format_seconds
from rsotrain.tracking.run_files import RunState

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STATE_STYLES = {
    RunState.running: "bold blue",
    RunState.finished: "green",
    RunState.stopped: "yellow",
    RunState.failed: "bold red",
    RunState.lost: "red",
}
BARS = (16, 8, 4)  # characters; the longest that leaves the names of the runs their room
DISPENSABLE = ("loss", "tok/s", "left")  # figures that give way to names, in this order
NAME_WIDTH = 30  # columns of a terminal that names have before the bar, or a figure, gives way


def follow(paths: Sequence[Path], keys: Sequence[str], *, mixed: bool, every: float) -> None:
    """Show the runs in ``paths`` until none runs, then how their groups compare.

    Raises UserError for those that cannot be compared when it begins; of one that appears later it says so.
    """
    from rich.console import Console
    from rich.live import Live

    console, told = Console(), Told()
    seen = looks(paths, every, told)
    runs, _ = next(seen)
    compare(runs, keys, mixed=mixed)  # refuse at once what cannot be compared at the end
    standard = runs[0]
    with Live(runs_table(runs, console.width), console=console, auto_refresh=False) as live:
        for runs, _ in seen:
            live.update(runs_table(runs, console.width), refresh=True)
    if not console.is_terminal:  # in one, the display ends with a line of its own
        console.line()
    if not mixed:
        runs, unlike = comparable(runs, standard)
        for sentence in unlike:
            told(sentence)
    if len(runs) > 1:
        print_comparison(compare(runs, keys, mixed=mixed))


def runs_table(runs: Sequence[Run], width: int) -> "Table":
    """A line for each run: what it is, how far it is, its latest figures; the running ones first.

    In a terminal of few columns (``width``) the bar is short, and figures give way to the names.
    """
    from rich.cells import cell_len
    from rich.text import Text

    states = [run.state.value for run in runs]
    counts = ", ".join(f"{states.count(s.value)} {s.value}" for s in STATE_STYLES if s.value in states)
    labels = label_runs(runs)
    figures = (
        {"left": [_time_left(run) for run in runs]} if RunState.running in {r.state for r in runs} else {}
    )
    figures |= {
        "loss": [_shown(run.latest("train/loss"), 4) for run in runs],
        "val loss": [_shown(run.latest(LOSS.metric), 4) for run in runs],
        "tok/s": ["–" if (n := run.latest(THROUGHPUT.metric)) is None else format_count(n) for run in runs],
    }
    name_width = min(NAME_WIDTH, max(map(cell_len, labels)))

    def room(bar: int) -> int:
        """What the other columns leave for names: each has two spaces and a border beside its text."""
        widths = [bar + len(" 100%"), max(map(len, states))]
        widths += [max(map(len, [name, *cells])) for name, cells in figures.items()]
        return width - 1 - sum(3 + w for w in widths) - 3

    bar = next((bar for bar in BARS if room(bar) >= name_width), BARS[-1])
    for name in DISPENSABLE:
        if room(bar) < name_width and name in figures:
            del figures[name]

    table = titled_table(f"{len(runs)} runs: {counts}")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("step", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    order = list(STATE_STYLES)
    for i in sorted(range(len(runs)), key=lambda i: (order.index(runs[i].state), labels[i])):
        table.add_row(
            labels[i],
            Text(states[i], style=STATE_STYLES[runs[i].state]),
            _progress(runs[i], bar),
            *(cells[i] for cells in figures.values()),
        )
    return table


def _progress(run: Run, length: int) -> "Text":
    from rich.text import Text

    done = max(0.0, min(1.0, run.step / run.steps)) if run.steps else 1.0
    bar = "━" * round(length * done)
    return Text.assemble((bar, "blue"), ("━" * (length - len(bar)), "dim"), f" {done:4.0%}")


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _time_left(run: Run) -> str:
    """By the mean pace of the run so far."""
    seconds = run.latest("time")
    if run.state is not RunState.running or not run.step or seconds is None:
        return ""
    return format_seconds(seconds / run.step * (run.steps - run.step))
