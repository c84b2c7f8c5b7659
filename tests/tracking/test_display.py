"""Lines, live display and tables: what they say, how wide they are, what reaches train.log."""

import io
import math
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rsotrain.config.schema import Progress
from rsotrain.tracking.display import Display, build_display, print_closing_table, print_parameter_table
from rsotrain.tracking.formats import format_bytes, format_count, format_seconds


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_units_keep_three_digits() -> None:
    assert [format_count(n) for n in (0, 812, 999, 1000, 12_345, 999_499, 999_500, 6_738_415_616, 2e13)] == [
        "0", "812", "999", "1.00k", "12.3k", "999k", "1.00M", "6.74B", "20.0T",
    ]  # fmt: skip
    assert [format_bytes(n) for n in (0, 1023, 1024, 1.3e9, 1023.9 * 2**20, 5 * 2**40)] == [
        "0 B", "1023 B", "1.00 KiB", "1.21 GiB", "1.00 GiB", "5.00 TiB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0.0832, 0.9999, 12.34, 59.97, 151, 3599.6, 3725, 90_000)] == [
        "83.2 ms", "1.0 s", "12.3 s", "1m00s", "2m31s", "1h00m", "1h02m", "1d01h",
    ]  # fmt: skip
    assert format_seconds(math.nan) == "?"


TRAIN = {
    "train/loss": 5.4321,
    "train/lr": 0.00123,
    "train/grad_norm": 0.5,
    "train/epoch": 1.25,
    "throughput/tokens_per_second": 12_345.0,
    "throughput/step_seconds": 0.5,
    "memory/peak_bytes": 2**30,
}
VALIDATION = {"val/loss": 5.5, "val/perplexity": 244.69, "val/bits_per_byte": 1.75}


def test_a_full_disk_costs_the_log_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_path = tmp_path / "train.log"
    log_path.symlink_to("/dev/full")
    shown = Display(live=False, total_steps=1000, log_path=log_path)
    shown.message("one")
    shown.close()
    assert capsys.readouterr().out == "one\n"


def test_plain_lines_align_and_go_to_the_log_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    log_path = tmp_path / "train.log"
    log_path.write_text("from an earlier start\n")
    shown = Display(live=False, total_steps=1000, log_path=log_path, clock=clock)
    shown.message("a [bold]message[/bold]")
    shown.update(1, TRAIN)  # 999 steps at the 0.5 s of the first
    clock.now += 99 * 1.0
    shown.update(100, TRAIN | {"train/loss": math.nan})  # 900 steps at the 1 s of all since
    shown.update(100, VALIDATION)
    shown.update(100, {"subspace/overlap": 0.5})  # nothing that a line shows
    shown.close()
    shown.message("after the end")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "a [bold]message[/bold]",
        "step    1/1000  loss  5.4321  lr 1.23e-03  grad     0.5  epoch  1.25"
        "  12.3k tok/s  1.00 GiB   8m20s left",
        "step  100/1000  loss     nan  lr 1.23e-03  grad     0.5  epoch  1.25"
        "  12.3k tok/s  1.00 GiB  15m00s left",
        "step  100/1000  val loss  5.5000  perplexity   244.69  bits/byte 1.7500",
        "after the end",
    ]
    assert log_path.read_text().splitlines() == ["from an earlier start", *lines[:-1]]


def test_escape_sequences_reach_neither_screen_nor_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for live in (False, True):
        shown = Display(live=live, total_steps=10, log_path=tmp_path / "train.log")
        shown.update(1, TRAIN)  # a live display has begun
        shown.message("\x1b]0;title\x07 \x9b2J \u202e :smile: [b]")
        shown.message(os.fsdecode(b"\xff"))
        shown.close()
        printed, log = capsys.readouterr().out, (tmp_path / "train.log").read_text()
        for text in (r"\x1b]0;title\x07 \x9b2J \u202e :smile: [b]", r"\udcff"):
            assert text in printed
            assert text in log.splitlines()
        assert not re.search("\x1b]0|\x9b|\u202e", printed)


def test_a_stopped_run_leaves_no_bar_that_would_seem_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for keep, erased in ((True, 0), (False, 2)):
        shown = build_display(Progress.live, 1000)
        shown.update(100, TRAIN)
        shown.message("stopped by SIGINT")
        capsys.readouterr()
        shown.close(keep_bar=keep)
        # the cursor goes up and erases a line for each that the display has, after it is drawn the last time
        end = capsys.readouterr().out.rpartition("left")[2]
        assert end.count("\x1b[2K") == erased


def test_live_display_shows_the_latest_and_logs_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    log_path = tmp_path / "train.log"
    shown = build_display(Progress.live, 1000, log_path=log_path)
    shown.message("before the first step")
    assert capsys.readouterr().out == "before the first step\n"  # nothing drawn yet
    shown.update(100, TRAIN)
    shown.update(100, VALIDATION)
    shown.message("from a thread")
    shown.update(250, TRAIN | {"train/loss": 4.25})
    shown.close()
    screen = capsys.readouterr().out
    last = screen[screen.rindex("step 250/1000") :]
    for text in ("25%", "loss 4.2500", "val loss 5.5000", "epoch 1.25", "12.3k tok/s", "1.00 GiB", "left"):
        assert text in last
    assert "from a thread" in screen
    # The cursor comes back as soon as the display has started: a killed run leaves the terminal usable.
    assert screen.index("\x1b[?25l") < screen.index("\x1b[?25h") < screen.index("from a thread")
    log = log_path.read_text()
    assert "\x1b" not in log
    starts = (
        "before the first",
        "step  100/1000  loss",
        "step  100/1000  val",
        "from a",
        "step  250/1000  loss",
    )
    for line, start in zip(log.splitlines(), starts, strict=True):
        assert line.startswith(start)


def test_auto_display_is_plain_where_stdout_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_display(Progress.auto, 10)._live is None
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert build_display(Progress.auto, 10)._live is not None
    assert build_display(Progress.plain, 10)._live is None
    monkeypatch.setenv("TERM", "dumb")
    assert build_display(Progress.auto, 10)._live is None


def test_closing_table_fits_80_columns_and_holds_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    summary = VALIDATION | {
        "val/unigram_perplexity": 713.2,
        "best/val/loss": math.inf,
        "throughput/tokens_per_second": 12_345.6,
        "throughput/step_seconds": 0.3321,
        "memory/peak_bytes": 1.3e9,
        "time": 613.2,
        "finished": True,
    }
    files = {"metrics": tmp_path / "outputs" / "metrics.jsonl", "wandb": "https://example.org/" + "x" * 100}
    print_closing_table(summary, files, tmp_path / "train.log")
    out = capsys.readouterr().out
    table, places = out.splitlines()[:-2], out.splitlines()[-2:]
    assert max(map(len, table)) <= 80
    assert "\x1b" not in out
    rows = {
        cells[1].strip(): cells[2].strip()
        for cells in (line.split("│") for line in out.splitlines())
        if len(cells) == 4
    }
    assert rows["validation loss"] == "5.5000"
    assert rows["validation perplexity"] == "244.69"
    assert rows["bits per byte"] == "1.7500"
    assert rows["unigram perplexity"] == "713.20"
    assert rows["best validation loss"] == "inf"
    assert rows["tokens per second"] == "12.3k"
    assert rows["time of a step"] == "332.1 ms"
    assert rows["peak memory"] == "1.21 GiB"
    assert rows["wall time"] == "10m13s"
    # in one piece each, so that they can be copied
    assert places == ["metrics: outputs/metrics.jsonl", f"wandb: https://example.org/{'x' * 100}"]
    assert "steps" not in rows
    assert (tmp_path / "train.log").read_text() == "".join(line.rstrip() + "\n" for line in out.splitlines())


def test_parameter_table_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    Row = namedtuple("Row", "group num_elements num_tensors lr rank state_bytes")
    print_parameter_table(
        [
            Row("blocks", 25_296_896, 56, 0.0025, 128, 2**20),
            Row("rest", 32_776_704, 19, 0.01, None, 2**20),
            Row("frozen", 10, 1, None, None, 0),
        ]
    )
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert cells == [
        ["group", "parameters", "tensors", "learning rate", "rank", "optimizer state"],
        ["blocks", "25,296,896", "56", "0.0025", "128", "1.00 MiB"],
        ["rest", "32,776,704", "19", "0.01", "-", "1.00 MiB"],
        ["frozen", "10", "1", "-", "-", "0 B"],
        ["total", "58,073,610", "76", "", "", "2.00 MiB"],
    ]


def test_tables_survive_a_terminal_without_unicode() -> None:
    code = (
        "from pathlib import Path; from rsotrain.tracking.display import print_closing_table\n"
        "print_closing_table({'val/loss': 1.0}, {'metrics': Path('m.jsonl')})\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
        check=True,
    ).stdout.decode("ascii")
    assert "| validation loss | 1.0000" in out
    assert max(map(len, out.splitlines())) <= 80
