"""Writing in the background: what waits for it, and what does not."""

import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks

import rsotrain.checkpoints.saving
from rsotrain.checkpoints.saving import BackgroundSaver
from rsotrain.parallel.ranks import World


def saving_for(seconds: float, patch: pytest.MonkeyPatch, folder: Path, world: World) -> BackgroundSaver:
    """A checkpoint that takes so long is being written."""

    def save_checkpoint(*_: Any, **__: Any) -> Path:
        time.sleep(seconds)
        return folder

    patch.setattr(rsotrain.checkpoints.saving, "save_checkpoint", save_checkpoint)
    saver = BackgroundSaver(folder, world, keep=1)
    saver.start(1, {"model": {"w": torch.ones(1)}, "optimizer": {}}, {}, {})
    return saver


def waiting(folder: Path, world: World) -> float:
    with pytest.MonkeyPatch.context() as patch:
        saver = saving_for(1.5 * world.rank, patch, folder, world)
        start = time.monotonic()
        assert saver.wait() is None
        return time.monotonic() - start


def closing(folder: Path, world: World) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rsotrain.checkpoints.saving, "_LAST_SECONDS", 0.2)
        saver = saving_for(60.0, patch, folder, world)
        start = time.monotonic()
        saver.close()
        return time.monotonic() - start


@pytest.mark.slow
def test_ranks_wait_for_each_other_and_not_for_one_that_is_lost(tmp_path: Path) -> None:
    start = time.monotonic()
    checks = {"waiting": partial(waiting, tmp_path), "closing": partial(closing, tmp_path)}
    outcomes = ranks.run(2, checks, tmp_path)
    assert min(ranks.succeeded(outcomes["waiting"])) > 1.0
    assert max(ranks.succeeded(outcomes["closing"])) < 30.0
    assert time.monotonic() - start < 55.0  # the processes have ended, too, though one thread sleeps on


def test_one_process_lets_its_checkpoint_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rsotrain.checkpoints.saving, "_LAST_SECONDS", 0.0)
    saver = saving_for(0.3, monkeypatch, tmp_path, World(torch.device("cpu")))
    start = time.monotonic()
    saver.close()
    assert time.monotonic() - start > 0.2


@pytest.mark.parametrize("end", [BackgroundSaver.wait, BackgroundSaver.close])
def test_no_thread_is_left_to_be_killed_by_the_end_of_the_process(
    end: Callable[[BackgroundSaver], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_result = futures.Future.set_result

    def set_and_linger(future: futures.Future[Any], result: Any) -> None:
        set_result(future, result)
        time.sleep(0.3)  # as one that frees its tensors

    monkeypatch.setattr(futures.Future, "set_result", set_and_linger)
    end(saving_for(0.0, monkeypatch, tmp_path, World(torch.device("cpu"))))
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}


def test_the_copies_of_a_gpu_end_before_they_are_written_and_before_the_next_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which order the host asks; that the device keeps to it is a check of tests/gpu."""
    asked: list[str] = []

    class Event:
        def record(self, stream: object) -> None:
            asked.append("copied")

        def synchronize(self) -> None:
            asked.append("waited for")

    class Stream:
        def __init__(self, *_: object) -> None: ...

        def wait_stream(self, other: object) -> None:
            asked.append("after the last update")

        def wait_event(self, event: Event) -> None:
            asked.append("before the next update")

    for name, value in {
        "Event": Event, "Stream": Stream, "stream": lambda _: nullcontext(), "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def save_checkpoint(*_: Any, **__: Any) -> Path:
        asked.append("written")
        return tmp_path

    monkeypatch.setattr(rsotrain.checkpoints.saving, "save_checkpoint", save_checkpoint)
    saver = BackgroundSaver(tmp_path, World(torch.device("cuda", 0)), keep=1)
    saver.let_copies_end()
    assert asked == []
    saver.start(1, {"model": {"w": torch.ones(1)}, "optimizer": {}}, {}, {})
    saver.wait()
    saver.let_copies_end()
    saver.let_copies_end()
    assert asked == ["after the last update", "copied", "waited for", "written", "before the next update"]
