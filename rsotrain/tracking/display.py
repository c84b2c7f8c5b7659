"""What a person sees of a run: plain lines or a live display, and the tables at its start and end.

rich is imported only where something is drawn with it.
"""

import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from rsotrain.config.schema import Progress
from rsotrain.tracking.escaping import for_terminal
from rsotrain.tracking.formats import format_bytes, format_count, format_seconds
from rsotrain.tracking.screen import silence

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table

WIDTH = 80  # columns that every table fits in
REFRESHES_PER_SECOND = 2  # of the live display: its clock ticks, and it costs training nothing


Format = Callable[[float], str]


def _fixed(digits: int) -> Format:
    return lambda value: f"{value:.{digits}f}"


def _cells(record: Mapping[str, object], fields: Sequence[tuple[str, str, Format, int]]) -> list[str]:
    """``label value`` of each field (metric name, label, format, width) that the record has."""
    cells = []
    for name, label, form, width in fields:
        value = record.get(name)
        if isinstance(value, int | float):
            cells.append(f"{label} {form(value):>{width}}".strip())
    return cells


def _tokens_per_second(value: float) -> str:
    return f"{format_count(value)} tok/s"


TRAIN_FIELDS: list[tuple[str, str, Format, int]] = [
    ("train/loss", "loss", _fixed(4), 7),
    ("train/lr", "lr", lambda value: f"{value:.2e}", 8),
    ("train/grad_norm", "grad", lambda value: f"{value:.3g}", 7),
    ("train/epoch", "epoch", _fixed(2), 5),
    ("throughput/tokens_per_second", "", _tokens_per_second, 11),
    ("memory/peak_bytes", "", format_bytes, 8),
]
MEMORY_FIELDS: list[tuple[str, str, Format, int]] = [
    ("memory/parameters_bytes", "memory: weights", format_bytes, 0),
    ("memory/gradients_bytes", "gradients", format_bytes, 0),
    ("memory/optimizer_state_bytes", "state", format_bytes, 0),
    ("memory/saved_activations_bytes", "activations", format_bytes, 0),
    ("memory/peak_bytes", "peak", format_bytes, 0),
]
VALIDATION_FIELDS: list[tuple[str, str, Format, int]] = [
    ("val/loss", "val loss", _fixed(4), 7),
    ("val/perplexity", "perplexity", _fixed(2), 8),
    ("val/legacy_perplexity", "legacy", _fixed(2), 8),
    ("val/bits_per_byte", "bits/byte", _fixed(4), 6),
]
LIVE_FIELDS: list[tuple[str, str, Format, int]] = [
    ("train/loss", "loss", _fixed(4), 0),
    ("val/loss", "val loss", _fixed(4), 0),
    ("train/epoch", "epoch", _fixed(2), 0),
    ("throughput/tokens_per_second", "", _tokens_per_second, 0),
    ("memory/peak_bytes", "", format_bytes, 0),
]


class Display:
    """Progress of one run, on stdout and in ``log_path``.

    ``live``: a bar and the latest figures that stay in place at the bottom, from the first ``update`` on;
    otherwise a line for each record. Messages and lines go to ``log_path`` (appended) in both cases,
    without control codes; ``silent``: neither. ``message`` may be called from any thread.
    """

    def __init__(
        self,
        *,
        live: bool,
        total_steps: int,
        start_step: int = 0,
        log_path: Path | None = None,
        silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._silent = silent
        self._total_steps = total_steps
        self._step = start_step
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._end: float | None = None  # when training ends, by the pace since the first update
        self._latest: dict[str, float | int | str] = {}
        self._lock = threading.RLock()  # a signal handler may speak while its thread does
        log = log_path if not silent else None
        self._log: IO[str] | None = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115
        self._live = _build_live(self._render) if live and not silent else None

    def update(self, step: int, record: Mapping[str, float | int | str]) -> None:
        """Show the metrics of ``step``: those of training, of an evaluation, or both."""
        self._pace(step, record)
        self._latest |= record
        if self._live is not None and not self._live.is_started:
            self._live.start()
            self._live.console.show_cursor(True)  # so that a killed run leaves the terminal as it was
        width = len(str(self._total_steps))
        prefix = f"step {step:>{width}}/{self._total_steps}"
        if "train/loss" not in record and (memory := _cells(record, MEMORY_FIELDS)):
            self._put("  ".join([prefix, *memory]), screen=self._live is None)
        elif train := _cells(record, TRAIN_FIELDS):
            left = f"{self._time_left():>6} left"
            self._put("  ".join([prefix, *train, left]), screen=self._live is None)
        if validation := _cells(record, VALIDATION_FIELDS):
            self._put("  ".join([prefix, *validation]))

    def message(self, text: str) -> None:
        """One line of its own, above the live display."""
        self._put(text)

    def close(self, *, keep_bar: bool = True) -> None:
        """Messages are plain lines from now on. ``keep_bar``: leave the live display on the screen as it is.

        That of a run that was stopped must go, since it would stand there as if the run went on.
        """
        with self._lock:
            live, self._live = self._live, None
            log, self._log = self._log, None
        if live is not None and live.is_started:
            live.transient = not keep_bar
            live.stop()
        if log is not None:
            with suppress(OSError):
                log.close()

    def _put(self, text: str, screen: bool = True) -> None:
        text = for_terminal(text)
        with self._lock:
            if self._log is not None:
                with suppress(OSError):  # a full disk ends no training
                    self._log.write(text + "\n")
                    self._log.flush()
            if not screen or self._silent:
                return
            if self._live is not None:
                self._live.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def _pace(self, step: int, record: Mapping[str, object]) -> None:
        """Wall time since the first update, evaluation and saving in it, tells when training ends."""
        now = self._clock()
        self._step = step
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step > first_step:
            step_seconds = (now - first_time) / (step - first_step)
        elif isinstance(seconds := record.get("throughput/step_seconds"), int | float):
            step_seconds = seconds
        else:
            return
        self._end = now + step_seconds * (self._total_steps - step)

    def _time_left(self) -> str:
        if self._end is None:
            return "?"
        seconds = max(0.0, self._end - self._clock())
        return f"{seconds:.0f} s" if seconds < 59.5 else format_seconds(max(seconds, 60.0))

    def _render(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):  # the bar takes what the figures leave
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text(f"step {self._step}/{self._total_steps}", style="bold"),
            ProgressBar(total=self._total_steps, completed=self._step),
            Text(f"{self._step / self._total_steps:.0%}"),
            Text(f"{self._time_left()} left", style="dim"),
        )
        figures = "   ".join(_cells(self._latest, LIVE_FIELDS))
        return Group(bar, Text(figures, no_wrap=True, overflow="ellipsis"))


def _build_live(render: "Callable[[], RenderableType]") -> "Live":
    from rich.console import Console
    from rich.live import Live

    # Asked for by name, it is drawn even where stdout does not look like a terminal.
    console = Console(force_terminal=True)
    return Live(console=console, get_renderable=render, refresh_per_second=REFRESHES_PER_SECOND)


def build_display(
    progress: Progress,
    total_steps: int,
    start_step: int = 0,
    *,
    log_path: Path | None = None,
    silent: bool = False,
) -> Display:
    """The display of one run; ``auto`` is live if stdout is a terminal that can move its cursor."""
    terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    live = progress is Progress.live or (progress is Progress.auto and terminal)
    return Display(
        live=live, total_steps=total_steps, start_step=start_step, log_path=log_path, silent=silent
    )


# --- tables ------------------------------------------------------------------------------------

SUMMARY_ROWS: list[tuple[str, str, Format]] = [
    ("val/loss", "validation loss", _fixed(4)),
    ("val/perplexity", "validation perplexity", _fixed(2)),
    ("val/legacy_perplexity", "with the legacy divisor", _fixed(2)),
    ("val/bits_per_byte", "bits per byte", _fixed(4)),
    ("val/unigram_perplexity", "unigram perplexity", _fixed(2)),
    ("best/val/loss", "best validation loss", _fixed(4)),
    ("throughput/tokens_per_second", "tokens per second", format_count),
    ("throughput/step_seconds", "time of a step", format_seconds),
    ("memory/peak_bytes", "peak memory", format_bytes),
    ("memory/parameters_bytes", "weights", format_bytes),
    ("memory/gradients_bytes", "gradients", format_bytes),
    ("memory/optimizer_state_bytes", "optimizer state", format_bytes),
    ("memory/saved_activations_bytes", "saved activations", format_bytes),
    ("step", "steps", lambda value: f"{value:,}"),
    ("tokens", "tokens", format_count),
    ("time", "wall time", format_seconds),
]


def print_closing_table(
    summary: Mapping[str, object], files: Mapping[str, Path | str], log_path: Path | None = None
) -> None:
    """Print the result of a run (names as in ``summary.json``; absent ones are left out) and its files."""
    table = titled_table("Result")
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, label, form in SUMMARY_ROWS:
        value = summary.get(name)
        if isinstance(value, int | float):
            table.add_row(label, form(value) if math.isfinite(value) else str(value))
    print_table(table, log_path)
    for label, place in files.items():
        _print_place(f"{label}: {shown_path(place)}", log_path)


def _print_place(text: str, log_path: Path | None) -> None:
    """A path in one piece, however long, so that it can be copied: no table, no line breaks."""
    text = for_terminal(text)
    print(text, flush=True)
    if log_path is not None:
        with suppress(OSError), open(log_path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def print_result_table(result: Mapping[str, object]) -> None:
    """Print names and values as they are, figures with four decimals, and below the path of the model."""
    table = titled_table("Result")
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        if name != "model":
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    print_table(table, None)
    if "model" in result:
        _print_place(f"model: {result['model']}", None)


class ParameterRow(Protocol):
    """One line of the optimizer's table of claims."""

    @property
    def group(self) -> str: ...
    @property
    def num_elements(self) -> int: ...
    @property
    def num_tensors(self) -> int: ...
    @property
    def lr(self) -> float | None: ...
    @property
    def rank(self) -> int | str | None: ...
    @property
    def state_bytes(self) -> int: ...


def print_parameter_table(rows: Sequence[ParameterRow], log_path: Path | None = None) -> None:
    """Print which group every parameter belongs to, and what it costs, with the totals below."""
    table = titled_table("Parameters")
    table.add_column("group", style="bold", overflow="fold")
    for name in ("parameters", "tensors", "learning rate", "rank", "optimizer state"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.group,
            f"{row.num_elements:,}",
            str(row.num_tensors),
            "-" if row.lr is None else f"{row.lr:.3g}",
            "-" if row.rank is None else str(row.rank),
            format_bytes(row.state_bytes),
        )
    table.add_section()
    table.add_row(
        "total",
        f"{sum(row.num_elements for row in rows):,}",
        str(sum(row.num_tensors for row in rows)),
        "",
        "",
        format_bytes(sum(row.state_bytes for row in rows)),
    )
    print_table(table, log_path)


def titled_table(title: str) -> "Table":
    """An empty table in the style of all tables on the screen, whose texts are literal."""
    from rsotrain.tracking.plain_table import PlainTable

    return PlainTable(title)


def print_table(table: "Table", log_path: Path | None = None) -> None:
    """On the screen, and at the end of ``log_path``."""
    from rich.console import Console

    console = Console()
    try:
        console.print(table, width=min(WIDTH, console.width), highlight=False)
    except BrokenPipeError:  # `| head`
        silence(sys.stdout)
    if log_path is not None:
        with suppress(OSError), open(log_path, "a", encoding="utf-8") as file:  # as for its lines
            file.write(_text_of(table))


def _text_of(table: "Table") -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=WIDTH).print(table, highlight=False)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def shown_path(place: Path | str) -> str:
    """A path relative to the working directory where it lies below it."""
    if isinstance(place, Path) and place.is_absolute() and place.is_relative_to(Path.cwd()):
        return str(place.relative_to(Path.cwd()))
    return str(place)
