"""Which checkpoints a run takes for its own, and which of them it passes over."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.run_folders import reseal
from helpers.runs import compose
from safetensors.torch import load_file, save_file

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.config.schema import Config
from rsotrain.errors import StoppedEarly, UserError
from rsotrain.running.mode import train


@pytest.fixture
def stopped_run(tiny: list[str], tmp_path: Path) -> Config:
    """One with the checkpoints of steps 2 and 4, of 6."""
    config = compose([*tiny, "optimizer=adam", f"output_dir={tmp_path}", "run_name=r", "keep_checkpoints=3"])
    train(config)
    shutil.rmtree(tmp_path / "r/checkpoints/step_00000006")
    (tmp_path / "r/summary.json").unlink()
    return config


def seal_tensors(checkpoint: Path, kind: str, value: float) -> None:
    file = checkpoint / f"{kind}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    names = [name for name in tensors if kind == "model" or name.endswith("exp_avg_sq")]
    tensors[names[0]].view(-1)[0] = value
    save_file(tensors, file)
    reseal(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        ("model", float("nan"), False),
        pytest.param("model", float("inf"), False, marks=pytest.mark.long),
        pytest.param("optimizer", float("nan"), False, marks=pytest.mark.long),
        ("optimizer", float("inf"), True),
    ],
)
def test_a_checkpoint_that_is_not_finite_is_passed_over(
    kind: str, value: float, taken: bool, stopped_run: Config, tmp_path: Path
) -> None:
    newest = tmp_path / "r/checkpoints/step_00000004"
    assert list_checkpoints(newest.parent)[-1] == newest
    seal_tensors(newest, kind, value)
    train(stopped_run)
    said = (tmp_path / "r/train.log").read_text()
    assert ("step_00000004 cannot be read and is passed over" in said) != taken
    assert f"resumed from {newest if taken else newest.with_name('step_00000002')}" in said


@pytest.mark.slow
@pytest.mark.parametrize("other", ["seed=1", "optimizer.lr=0.5"])
def test_another_runs_checkpoint_among_its_own_is_refused(
    other: str, stopped_run: Config, tiny: list[str], tmp_path: Path
) -> None:
    common = [*tiny, "optimizer=adam", f"output_dir={tmp_path}"]
    train(compose([*common, other, "run_name=other"]))
    foreign, own = (tmp_path / name / "checkpoints" for name in ("other", "r"))
    shutil.copytree(foreign / "step_00000006", own / "step_00000005")
    with pytest.raises(UserError, match=rf"settings \({other.split('=')[0]}: [\d.]+ there, [\d.]+ here\)"):
        train(stopped_run)
    fresh = compose([*common, "run_name=fresh"])
    (tmp_path / "fresh").mkdir()
    shutil.copytree(foreign, tmp_path / "fresh/checkpoints")  # without a config.yaml to compare
    with pytest.raises(UserError, match="is of a run with other settings"):
        train(fresh)
    continued = ["run_name=continued", "steps=8", f"checkpoint.path={foreign / 'step_00000006'}"]
    assert train(compose([*common[:-1], common[-1], *continued]))["step"] == 8  # that is meant


@pytest.mark.slow
def test_a_checkpoint_that_does_not_name_its_settings_is_taken(stopped_run: Config, tmp_path: Path) -> None:
    newest = tmp_path / "r/checkpoints/step_00000004"
    record = json.loads((newest / "trainer.json").read_text())
    del record["run"]["settings"]
    (newest / "trainer.json").write_text(json.dumps(record))
    reseal(newest)
    train(stopped_run)
    assert f"resumed from {newest}" in (tmp_path / "r/train.log").read_text()


@pytest.mark.slow
def test_a_longer_run_in_the_same_folder_is_still_told_what_differs(tiny: list[str], tmp_path: Path) -> None:
    common = [*tiny, "optimizer=adam", f"output_dir={tmp_path}", "run_name=r", "save_every=1"]
    with pytest.raises(StoppedEarly):
        train(compose([*common, "steps=100000", "max_seconds=0.2"]))
    with pytest.raises(UserError, match=r"holds a run with steps=100000, on which .* over steps=200000"):
        train(compose([*common, "steps=200000"]))


def test_tensors_are_checked_whatever_their_type() -> None:
    from rsotrain.checkpoints.files import check_finite
    from rsotrain.errors import NonFiniteError

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        tensor = torch.ones(3, 5).to(dtype)
        check_finite({"model": {"w": tensor, "none": tensor[:0], "i": torch.ones(2, dtype=torch.int8)}})
        tensor[2, 4] = float("nan")
        with pytest.raises(NonFiniteError, match="w is not finite"):
            check_finite({"model": {"w": tensor}})
