"""Checkpoints on disk: whole or absent, pruned, and never executed."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import rsotrain.checkpoints.files as checkpoint
from rsotrain.checkpoints.files import (
    DamagedError,
    list_checkpoints,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
)
from rsotrain.errors import UserError

CPU = torch.device("cpu")


def save(folder: Path, step: int, keep: int = 2, score: float | None = None) -> Path:
    weight = torch.full((3, 2), float(step), dtype=torch.bfloat16)
    tensors = {"model": {"w": weight, "v": weight.t()}, "optimizer": {"w.exp_avg": weight.float()}}
    return save_checkpoint(folder, step, tensors, {"step": step, "score": score}, keep=keep)


def test_round_trip_keeps_dtype_and_bits(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path.name == "step_00000100"
    model, optimizer, record = load_checkpoint(path, CPU)
    assert model["w"].dtype == torch.bfloat16
    assert model["v"].shape == (2, 3)
    assert optimizer["w.exp_avg"].eq(100).all()
    assert record == {"step": 100, "score": None}


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-step_00000007").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_00000003", "step_00000010"]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
def test_as_many_are_kept_as_were_asked_for(keep: int, tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
        kept = [int(p.name[5:]) for p in list_checkpoints(tmp_path)]
        assert kept == list(range(1, step + 1))[-keep:]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, score in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None), (5, 2.0), (6, 2.1), (7, float("nan"))):
        save(tmp_path, step, keep=1, score=score)
        kept = [int(p.name[5:]) for p in list_checkpoints(tmp_path)]
        assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6], 7: [5, 7]}[step]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "too many", "no checksums"])
def test_damage_is_noticed(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if kind == "flipped":  # the last byte is one of the tensors'
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "truncated":
        file.write_bytes(content[:-4])
    elif kind == "too many":
        (path / "model").mkdir()
        (path / "model/shard.safetensors").write_bytes(content)
    else:
        (file if kind == "missing" else path / "checksums.json").unlink()
    expected = {"missing": OSError, "no checksums": UserError}
    with pytest.raises(expected.get(kind, DamagedError)):
        load_checkpoint(path, CPU)


def test_saving_replaces_a_damaged_one_of_that_step_and_drops_later_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000004" / "model.safetensors").write_bytes(b"")
    path = save(tmp_path, 4, keep=1)  # a run that went on from 2
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004"]
    assert load_checkpoint(path, CPU)[0]["w"].eq(4).all()


def test_files_can_be_read_by_those_who_read_the_rest(tmp_path: Path) -> None:
    assert len({file.stat().st_mode for file in save(tmp_path, 1).iterdir()}) == 1


def test_a_failure_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    (tmp_path / ".partial-step_00000009").mkdir()  # of a process that was killed

    def full_disk(tensors: object, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]  # and nothing takes room
    monkeypatch.undo()
    save(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_a_pickle_in_disguise_is_not_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "executed"),))  # type: ignore[return-value]

    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(pickle.dumps(Hostile()))
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))  # where torch's own format has a pickle
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        load_checkpoint(path, CPU)
    with pytest.raises(SafetensorError):
        load_tensors(path, "model")
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(OSError, match="No such file"):
        load_checkpoint(path, CPU)
