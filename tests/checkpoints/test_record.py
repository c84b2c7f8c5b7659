"""The evaluation that a checkpoint is told of after it was begun."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rsotrain.checkpoints import saving
from rsotrain.checkpoints.files import list_checkpoints, save_checkpoint
from rsotrain.checkpoints.record import DamagedError, add_evaluation, check_record, load_record, score
from rsotrain.checkpoints.saving import BackgroundSaver
from rsotrain.parallel.ranks import World

RUN: dict[str, Any] = {"data": "d", "seconds": 1.0, "validation": {}, "record": {}, "settings": {"seed": 0}}
TENSORS = {"model": {"w": torch.ones(2)}, "optimizer": {}}


def save(folder: Path, step: int, **settings: Any) -> Path:
    record = {"step": step, "tokens": 8, "run": RUN, "score": None}
    return save_checkpoint(folder, step, TENSORS, record, keep=settings.pop("keep", 2), **settings)


def test_an_evaluation_takes_the_place_of_what_was_known_before(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    assert score(path) == float("inf")
    add_evaluation(path, 2.5, {"seconds": 3.0, "validation": {"step": 4, "val/loss": 2.5}})
    record = load_record(path)
    assert record["score"] == score(path) == 2.5
    assert record["run"] == RUN | {"seconds": 3.0, "validation": {"step": 4, "val/loss": 2.5}}
    check_record(record)


@pytest.mark.parametrize("damage", ["torn", "changed", "list", "absent"])
def test_a_damaged_evaluation_is_none(damage: str, tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    add_evaluation(path, 2.5, {"seconds": 3.0})
    file = path / "evaluation.json"
    content = json.loads(file.read_text())
    content["evaluation"]["score"] = 1.5
    changed = {"torn": file.read_text()[:-9], "changed": json.dumps(content), "list": "[]", "absent": None}
    file.unlink()
    if (text := changed[damage]) is not None:
        file.write_text(text)
    assert load_record(path)["run"] == RUN
    assert score(path) == float("inf")


def test_a_record_without_what_a_run_needs_is_damaged(tmp_path: Path) -> None:
    record = load_record(save(tmp_path, 4))
    check_record(record)
    for key in ("tokens", "run"):
        with pytest.raises(DamagedError):
            check_record({name: value for name, value in record.items() if name != key})
    for key, value in (("step", 2**63), ("tokens", 10**4000), ("tokens", True), ("step", -1)):
        with pytest.raises(DamagedError):
            check_record(record | {key: value})
    with pytest.raises(DamagedError):
        check_record(record | {"run": RUN | {"record": {"train/loss": 10**4000}}})
    for key in ("data", "seconds", "validation", "record"):
        with pytest.raises(DamagedError):
            check_record(record | {"run": {name: value for name, value in RUN.items() if name != key}})


@pytest.mark.parametrize("early", [True, False])
def test_a_checkpoint_is_scored_while_it_is_written_and_after(
    early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def waiting(*arguments: Any, **settings: Any) -> Path:
        go.wait(30)
        return save_checkpoint(*arguments, **settings)

    monkeypatch.setattr(saving, "save_checkpoint", waiting)
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.6)):
        saver = BackgroundSaver(tmp_path, World(torch.device("cpu")), keep=1)
        go.clear()
        saver.start(step, TENSORS, {}, {"step": step, "run": RUN, "score": None})
        if early:
            saver.score(step, loss, {"seconds": 2.0})
        go.set()
        assert saver.wait() is None
        if not early:
            saver.score(step, loss, {"seconds": 2.0})
        newest = list_checkpoints(tmp_path)[-1]
        assert (newest.name, score(newest)) == (f"step_{step:08d}", loss)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000008"]  # best, newest


def test_an_evaluation_that_cannot_be_recorded_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    saver = BackgroundSaver(tmp_path, World(torch.device("cpu")), keep=1, warn=said.append)
    saver.start(2, TENSORS, {}, {"step": 2, "run": RUN})
    assert saver.wait() is None

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "score_checkpoint", full)
    saver.score(2, 1.0, {})
    (warning,) = said
    assert warning.startswith("warning: the evaluation of step 2 was not recorded: No space left on device")
    saver.score(3, 1.0, {})  # of a step that was not saved
