"""``--live``: the runs of a sweep in a table that follows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rsotrain.report.comparison import LOSS, comparable, compare, label_runs
from rsotrain.report.runs import Run
from rsotrain.report.tables import screen
from rsotrain.report.watching import Told, looks
from rsotrain.tracking.display import format_count, format_seconds, titled_table
from rsotrain.tracking.run_files import RunState

if TYPE_CHECKING:
    from rich.table import Table

STATE_STYLES = {
    RunState.running: "bold blue",
    RunState.finished: "green",
    RunState.stopped: "yellow",
    RunState.failed: "bold red",
    RunState.lost: "red",
}
BAR = 16  # characters


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
    with Live(runs_table(runs), console=console, auto_refresh=False, transient=False) as live:
        for runs, _ in seen:
            live.update(runs_table(runs), refresh=True)
    if not mixed:
        runs, unlike = comparable(runs, standard)
        for sentence in unlike:
            told(sentence)
    if len(runs) > 1:
        console.print(screen(compare(runs, keys, mixed=mixed), console.width))


def runs_table(runs: Sequence[Run]) -> "Table":
    """A line for each run: what it is, how far it is, its latest figures; the running ones first."""
    from rich.text import Text

    states = [run.state.value for run in runs]
    counts = ", ".join(f"{states.count(s.value)} {s.value}" for s in STATE_STYLES if s.value in states)
    table = titled_table(f"{len(runs)} runs: {counts}")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("step", no_wrap=True)
    for label in ("left", "loss", "val loss", "tok/s"):
        table.add_column(label, justify="right", no_wrap=True)
    order = list(STATE_STYLES)
    for run, label in sorted(
        zip(runs, label_runs(runs), strict=True), key=lambda pair: (order.index(pair[0].state), pair[1])
    ):
        done = min(1.0, run.step / run.steps) if run.steps else 1.0
        bar = "━" * round(BAR * done)
        progress = Text.assemble((bar, "blue"), ("━" * (BAR - len(bar)), "dim"), f" {done:4.0%}")
        table.add_row(
            label,
            Text(run.state.value, style=STATE_STYLES[run.state]),
            progress,
            _time_left(run),
            _shown(run.latest("train/loss"), 4),
            _shown(run.latest(LOSS.metric), 4),
            "–" if (speed := run.latest("throughput/tokens_per_second")) is None else format_count(speed),
        )
    return table


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _time_left(run: Run) -> str:
    """By the mean pace of the run so far."""
    seconds = run.latest("time")
    if run.state is not RunState.running or not run.step or seconds is None:
        return ""
    return format_seconds(seconds / run.step * (run.steps - run.step))
