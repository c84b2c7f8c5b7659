"""Training goes on whatever becomes of the screen: whole runs with a lost one, and the stream itself."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import DIVERGING

from rsotrain.tracking.screen import survive_its_loss

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tiny: list[str], tmp_path: Path) -> Start:
    def begin(*extra: str, prefix: tuple[str, ...] = (), **settings: Any) -> "subprocess.Popen[bytes]":
        command = [*prefix, sys.executable, "-m", "rsotrain", *tiny, "optimizer=adam", "run_name=r", *extra]
        return subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **settings)

    return begin


def assert_finished(process: "subprocess.Popen[bytes]", folder: Path, steps: int) -> None:
    assert process.wait(timeout=120) == 0
    assert json.loads((folder / "outputs/r/summary.json").read_text())["step"] == steps
    assert f"step {steps}/{steps}" in (folder / "outputs/r/train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("progress", ["plain", "live"])
def test_a_terminal_that_is_closed(progress: str, start: Start, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(
        "steps=200", f"logger.progress={progress}", **terminal, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    while b"step" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)  # from here on what the run writes is an input/output error
    assert_finished(process, tmp_path, 200)


@pytest.mark.slow
def test_a_pipe_that_nobody_reads(start: Start, tmp_path: Path) -> None:
    process = start("steps=200", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert_finished(process, tmp_path, 200)


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("progress", ["plain", "live"])
def test_a_screen_that_takes_nothing(redirection: str, progress: str, start: Start, tmp_path: Path) -> None:
    shell = ("sh", "-c", f'exec "$@" {redirection}', "sh")
    assert_finished(start(f"logger.progress={progress}", prefix=shell), tmp_path, 6)
    first = (tmp_path / "outputs/r/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["step"] == 1  # nothing else was written into a file that took its place


@pytest.mark.slow
def test_a_failed_training_keeps_its_status_without_a_screen(start: Start) -> None:
    shell = ("sh", "-c", 'exec "$@" >/dev/full 2>/dev/full', "sh")
    wild = (*DIVERGING, "lr_scheduler=constant", "lr_scheduler.warmup_fraction=0")
    assert start(*wild, prefix=shell).wait(timeout=120) == 1


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    survive_its_loss()
    print("a ship ⛵ at sea", flush=True)
    assert raw.getvalue() == b"a ship ? at sea\n"
    sys.stdout.close()
    print("goes nowhere", flush=True)
    survive_its_loss()  # again, by the next run of this process
    print("nor does this", flush=True)
