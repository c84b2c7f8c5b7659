"""Throughput, peak memory, and the JSON files of a run."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rsotrain.files import write_json_atomic
from rsotrain.tracking.loggers import JsonlLogger, Loggers
from rsotrain.tracking.metrics import StepTimer, Throughput, peak_memory_bytes


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- metrics.py --------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_out_paused_time() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    assert timer.lap() is None
    assert timer.median() is None
    for _ in range(4):
        clock.now += 0.5
        timer.tick(64)
    with timer.pause():
        clock.now += 1000.0
    assert timer.lap() == Throughput(tokens_per_second=128.0, step_seconds=0.5)
    with contextlib.suppress(RuntimeError), timer.pause():  # a failed evaluation is left out, too
        clock.now += 1000.0
        raise RuntimeError
    clock.now += 2.0
    timer.tick(64)
    lap = timer.lap()
    assert lap is not None
    assert lap.metrics() == {"throughput/tokens_per_second": 32.0, "throughput/step_seconds": 2.0}


def test_median_throughput_is_over_laps_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsotrain.tracking.metrics.MAX_LAPS", 64)
    clock = Clock()
    timer = StepTimer(clock)
    clock.now += 1000.0  # a first lap with compilation in it does not move the median
    for _ in range(1000):
        timer.tick(10)
        timer.lap()
        clock.now += 2.0
    assert timer.median() == Throughput(tokens_per_second=5.0, step_seconds=2.0)
    assert len(timer._laps) <= 64


def test_peak_memory_grows_with_an_allocation_and_is_this_programs_own() -> None:
    code = """
import subprocess, sys
from rsotrain.tracking.metrics import peak_resident_bytes
before = peak_resident_bytes()
block = bytearray(b"x") * (300 * 2**20)
print(before, peak_resident_bytes(), flush=True)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
    child = subprocess.run(
        [sys.executable, "-c", code, "from rsotrain.tracking.metrics import *; print(peak_resident_bytes())"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    before, after, grandchild_peak = map(int, child.stdout.split())
    assert 2**20 < before < 2**27
    assert after - before >= 300 * 2**20
    # A small program started by a large one has its own, small peak.
    assert 2**20 < grandchild_peak < 2**27
    assert peak_memory_bytes("cpu") >= before  # this process has torch loaded, too


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel keeps the peak")
def test_a_run_forgets_the_peak_of_the_one_before() -> None:
    code = """
from rsotrain.running.allocator import keep_freed_memory
from rsotrain.tracking.metrics import forget_peak_memory, peak_memory_bytes
import torch
keep_freed_memory()
before = peak_memory_bytes("cpu")
pieces = [torch.ones(2**18) for _ in range(200)]
large = peak_memory_bytes("cpu")
del pieces
forget_peak_memory("cpu")
print(large - before, peak_memory_bytes("cpu") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    large, small = map(int, done.stdout.split())
    assert large > 190 * 2**20
    assert small < 30 * 2**20


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"val/loss": math.nan, "nested": {"a": [math.inf, 1.5, True]}, "n": None})
    expected = {"val/loss": None, "nested": {"a": [None, 1.5, True]}, "n": None}
    assert json.loads(path.read_text()) == expected
    with pytest.raises(TypeError):
        write_json_atomic(path, {"path": tmp_path})
    assert json.loads(path.read_text()) == expected
    assert list(tmp_path.iterdir()) == [path]


# --- metrics.jsonl -----------------------------------------------------------------------------


def test_jsonl_line_is_on_disk_at_once_and_valid_json(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log({"train/loss": math.nan, "train/grad_norm": math.inf, "device": "cpu"}, step=3)
    assert records(logger.path) == [{"step": 3, "train/loss": None, "train/grad_norm": None, "device": "cpu"}]
    logger.close({}, 0)


def test_jsonl_resumes_as_if_never_interrupted(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    logger = JsonlLogger(whole)
    for step in range(1, 8):
        logger.log({"train/loss": 1 / step, "tokens": 10 * step}, step)
    logger.close({}, 0)
    lines = whole.read_text().splitlines(keepends=True)
    # Killed while it wrote step 7, the last checkpoint at step 4; and a disk that lost a block.
    killed.write_text("".join([*lines[:2], "\0\0\0\n", "[1]\n", *lines[2:6], lines[6][:9]]))
    logger = JsonlLogger(killed, resume_step=4)
    for step in range(5, 8):
        logger.log({"train/loss": 1 / step, "tokens": 10 * step}, step)
    logger.close({}, 0)
    assert killed.read_bytes() == whole.read_bytes()


def test_jsonl_torn_line_within_the_kept_steps_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # whole by chance, yet its newline is missing
    JsonlLogger(path, resume_step=5).close({}, 0)
    assert path.read_text() == '{"step": 1}\n'


def test_jsonl_starts_anew_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlLogger(path, resume_step=2).close({}, 0)
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n')
    JsonlLogger(path).close({}, 0)
    assert path.read_text() == ""


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    said: list[str] = []
    logger = JsonlLogger(path, warn=said.append)
    for step in (1, 2):
        logger.log({"train/loss": 1.0}, step)
    logger.close({}, 0)
    assert said == ["warning: metrics.jsonl cannot be written: No space left on device"]


def test_all_loggers_are_closed_even_when_one_fails(tmp_path: Path) -> None:
    class Broken:
        def log(self, record: object, step: int) -> None: ...

        def close(self, summary: object, exit_code: int) -> None:
            raise OSError("disk full")

    jsonl = JsonlLogger(tmp_path / "metrics.jsonl")
    loggers = Loggers([Broken(), jsonl])
    loggers.log({"train/loss": 1.0}, 1)
    with pytest.raises(OSError, match="disk full"):
        loggers.close({}, 0)
    assert jsonl._file.closed
    assert records(jsonl.path) == [{"step": 1, "train/loss": 1.0}]
