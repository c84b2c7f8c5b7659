"""Runs with adapters: used and exported merged, and beginning or begun by runs without them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.runs import compose, load_data
from safetensors.torch import load_file

from rsotrain.checkpoints.files import load_tensors
from rsotrain.checkpoints.record import DamagedError, load_record
from rsotrain.cli.dispatch import run_mode
from rsotrain.config.schema import Config, Strategy
from rsotrain.data.build import Data
from rsotrain.errors import UserError
from rsotrain.models.lora_linear import is_factor
from rsotrain.parallel.ranks import World
from rsotrain.running.mode import train
from rsotrain.running.resume import resume
from rsotrain.training.trainer import Trainer

RELORA = [
    "optimizer=relora", "optimizer.merge_every=4", "optimizer.restart_warmup_steps=1", "optimizer.lr=0.05",
    "optimizer.alpha=24",
]  # fmt: skip
LAST = "checkpoints/step_00000006"


@pytest.fixture(scope="module")
def runs(tiny: list[str], tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of ReLoRA, with a merge in its 6 steps and adapters that are not 0 at its end; one of Adam."""
    folder = tmp_path_factory.mktemp("runs")
    for name, own in (("relora", RELORA), ("adam", ["optimizer=adam"])):
        train(compose([*tiny, *own, f"output_dir={folder}", f"run_name={name}"]))
    return folder


def loss_of(run: Path) -> float:
    return float(json.loads((run / "summary.json").read_text())["val/loss"])


@pytest.mark.slow
def test_it_is_evaluated_and_exported_merged(runs: Path, tiny: list[str], tmp_path: Path) -> None:
    run, folder = runs / "relora", tmp_path / "exported"
    given = f"checkpoint.path={run}"
    evaluated: Any = run_mode(compose([*tiny, "mode=evaluate", given]))
    assert evaluated["val/loss"] == pytest.approx(loss_of(run), rel=1e-6)  # float32 sums in another order
    assert run_mode(compose([*tiny, "mode=generate", given, "generate.max_new_tokens=2"]))["samples"]  # type: ignore[index]
    run_mode(compose([*tiny, "mode=export", given, f"export.path={folder}"]))
    exported, saved = load_file(folder / "model.safetensors"), load_tensors(run / LAST, "model")
    assert exported.keys() == load_tensors(runs / "adam" / LAST, "model").keys()
    assert any(is_factor(name) for name in saved)
    for name, tensor in exported.items():
        if name.endswith("_proj.weight"):
            A, B = (saved[name.replace(".weight", f".lora_{factor}")] for factor in "AB")
            assert B.abs().max() > 0
            torch.testing.assert_close(tensor, saved[name] + 24 / 16 * B @ A)
            assert not torch.equal(tensor, saved[name])
        else:
            assert torch.equal(tensor, saved[name])


def begun(config: Config, data: Data, world: World) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss with which a run begins, and its adapters' B."""
    trainer = Trainer(config, data, world)
    assert resume(trainer, Path("nowhere"), lambda _: None) is None
    factors = {n: p for n, p in trainer.state_dict()["model"].items() if n.endswith("lora_B")}
    return trainer.evaluate()["val/loss"], {n: p.clone() for n, p in factors.items()}


@pytest.mark.parametrize("number", [1, 2])
def test_weights_pass_between_runs_with_and_without_adapters(
    number: int, runs: Path, tiny: list[str], tmp_path: Path, cache_dir: Path
) -> None:
    """Adam's into ReLoRA is the paper's full-rank start; what begins with ReLoRA's begins merged."""
    configs = {
        f"{source}-{method}": compose(
            [*tiny, f"optimizer={method}", f"checkpoint.path={runs / source}", "checkpoint.load=weights"]
        )
        for source, method in (("adam", "relora"), ("relora", "adam"), ("relora", "lora"))
    }
    data = load_data(next(iter(configs.values())), cache_dir)
    checks = {name: partial(begun, config, data) for name, config in configs.items()}
    if number == 1:
        found = {name: [check(World(torch.device("cpu")))] for name, check in checks.items()}
    else:
        found = ranks.run(number, checks, tmp_path / "ranks", Strategy.fsdp)
    for name, outcomes in found.items():
        for loss, factors in ranks.succeeded(outcomes):
            assert loss == pytest.approx(loss_of(runs / name.split("-")[0]), rel=1e-6), name
            assert len(factors) == (0 if name.endswith("adam") else 14)
            assert all(B.abs().max() == 0 for B in factors.values())


def test_adapters_of_another_alpha_are_refused(runs: Path, tiny: list[str], cache_dir: Path) -> None:
    config = compose([*tiny, *RELORA, "optimizer.alpha=8", f"checkpoint.path={runs / 'relora'}"])
    trainer = Trainer(config, load_data(config, cache_dir))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(UserError, match=r"α=24\.0, which optimizer\.alpha=8\.0 would not mean"):
        resume(trainer, Path("nowhere"), lambda _: None)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_damaged_alpha_is_said(runs: Path, tmp_path: Path) -> None:
    record = json.loads((runs / "relora" / LAST / "trainer.json").read_text())
    assert record["adapter_alpha"] == 24.0
    assert "adapter_alpha" not in json.loads((runs / "adam" / LAST / "trainer.json").read_text())
    for wrong in ("24", None, [1]):
        (tmp_path / "trainer.json").write_text(json.dumps(record | {"adapter_alpha": wrong}))
        with pytest.raises(DamagedError):
            load_record(tmp_path)
