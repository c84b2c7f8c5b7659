"""Evaluations of a run: killed in one, stopped in one, one that is not finite."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.command import Cli
from helpers.run_folders import assert_same_tensors, history
from helpers.runs import DIVERGING, compose, trainer

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.checkpoints.record import load_record
from rsotrain.config.schema import Config
from rsotrain.errors import StoppedEarly, TrainingError
from rsotrain.parallel.ranks import World
from rsotrain.running.mode import train
from rsotrain.training.trainer import Trainer

CPU = torch.device("cpu")
Act = Callable[[Trainer], None]


def acting_in_evaluation(config: Config, step: int, batch: int, act: Act, counted: list[int]) -> None:
    """Train; before evaluation batch number ``batch`` after ``step``, ``act``. Counts batches."""
    original = Trainer.evaluate

    def evaluate(self: Trainer, between: Callable[[], None]) -> dict[str, float]:
        counted.append(0)

        def wrapped() -> None:
            counted[-1] += 1
            if (self.step, counted[-1]) == (step, batch):
                act(self)
            between()

        return original(self, wrapped)

    Trainer.evaluate = evaluate  # type: ignore[assignment, method-assign]
    try:
        train(config)
    finally:
        Trainer.evaluate = original  # type: ignore[method-assign]


def stopped(config: Config, step: int, rank: int, world: World) -> tuple[int, list[int]]:
    """(exit status, number of batches of each evaluation) where ``rank`` is told to stop in one."""

    def ask(trainer: Trainer) -> None:
        if trainer.world.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    counted: list[int] = []
    try:
        acting_in_evaluation(config, step, 2, ask, counted)
    except SystemExit as end:
        return int(end.code or 0), counted
    return 0, counted


def run_of(tiny: list[str], folder: Path, name: str, *extra: str) -> Config:
    chosen = dict(o.split("=", 1) for o in [*tiny, *extra])
    named = {"output_dir": folder, "run_name": name}
    return compose([f"{key}={value}" for key, value in (chosen | named).items()])


EVALUATING = ["optimizer=adam", "eval_every=3", "save_every=3", "steps=9"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])
def test_a_run_that_is_killed_in_an_evaluation_has_the_checkpoint_of_that_step(
    step: int, tiny: list[str], tmp_path: Path
) -> None:
    config = run_of(tiny, tmp_path, "r", *EVALUATING)
    final = tmp_path / f"r/checkpoints/step_{step:08d}"

    def die(trainer: Trainer) -> None:
        deadline = time.monotonic() + 60
        while not final.is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            acting_in_evaluation(config, step, 2, die, [])
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list_checkpoints(tmp_path / "r/checkpoints")[-1] == final
    train(config)
    train(run_of(tiny, tmp_path, "s", *EVALUATING))
    assert history(tmp_path / "r") == history(tmp_path / "s")
    last = "checkpoints/step_00000009"
    assert_same_tensors(tmp_path / "r" / last, tmp_path / "s" / last)
    assert load_record(tmp_path / "r" / last)["score"] == load_record(tmp_path / "s" / last)["score"]


@pytest.mark.slow
def test_a_kill_between_the_line_of_an_evaluation_and_its_record_does_not_double_the_line(
    tiny: list[str], tmp_path: Path
) -> None:
    config = run_of(tiny, tmp_path, "r", *EVALUATING)
    train(config)
    whole = history(tmp_path / "r")
    for name in ("summary.json", "checkpoints/step_00000009/evaluation.json"):
        (tmp_path / "r" / name).unlink()
    train(config)
    assert history(tmp_path / "r") == whole


@pytest.mark.slow
def test_a_request_to_stop_leaves_the_evaluation_and_the_next_start_repeats_it(
    tiny: list[str], tmp_path: Path
) -> None:
    config = run_of(tiny, tmp_path, "r", *EVALUATING)
    alone = World(CPU)
    counts = []
    for step in (3, 9):
        status, counted = stopped(config, step, 0, alone)
        assert status == 75
        assert counted[-1] == 2  # of more, as the others show
        counts += counted[:-1]
    said = (tmp_path / "r/train.log").read_text()
    assert said.count("stopped by SIGTERM in the evaluation after step") == 2
    train(config)
    assert len(counts) == 2  # steps 3 and 6
    assert min(counts) > 4
    train(run_of(tiny, tmp_path, "s", *EVALUATING))
    assert history(tmp_path / "r") == history(tmp_path / "s")
    names = ("val/loss", "best/val/loss", "train/loss")
    a, b = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("r", "s"))
    assert {n: a[n] for n in names} == {n: b[n] for n in names}


@pytest.mark.slow
def test_ranks_leave_an_evaluation_together(tiny: list[str], tmp_path: Path) -> None:
    config = run_of(tiny, tmp_path, "r", *EVALUATING, "parallelism=fsdp")
    checks = {
        "first": partial(stopped, config, 3, 1),
        "last": partial(stopped, config, 9, 0),
        "rest": partial(stopped, config, 99, 0),
    }
    outcomes = {name: ranks.succeeded(o) for name, o in ranks.run(2, checks, tmp_path / "out").items()}
    for name, step in (("first", 3), ("last", 9)):
        (status, counted), other = outcomes[name]
        assert (status, counted) == other
        assert (status, counted[-1]) == (75, 2), step
    assert [status for status, _ in outcomes["rest"]] == [0, 0]
    lines = history(tmp_path / "r")
    assert [r["step"] for r in lines if "val/loss" in r] == [3, 6, 9]
    assert [r["step"] for r in lines if "train/loss" in r] == list(range(1, 10))


@pytest.mark.slow
def test_the_time_budget_ends_an_evaluation(tiny: list[str], tmp_path: Path) -> None:
    config = run_of(tiny, tmp_path, "r", *EVALUATING, "max_seconds=5")
    counted: list[int] = []
    with pytest.raises(StoppedEarly):
        acting_in_evaluation(config, 3, 2, lambda _: time.sleep(5.0), counted)
    assert counted == [2]
    assert "which needs more seconds" in (tmp_path / "r/train.log").read_text()


def test_samples_and_evaluations_that_are_left_leave_the_model_in_training(
    tiny: list[str], tmp_path: Path, cache_dir: Path
) -> None:
    made = trainer([*tiny, "optimizer=adam"], cache_dir)
    for stretch in (made.generate, made.evaluate):
        calls: list[int] = []

        def between(calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise TimeoutError

        made.model.train()
        with pytest.raises(TimeoutError):
            stretch(between)
        assert made.model.training
        assert len(calls) == 3


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_though_it_was_saved_before_it_was_evaluated(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {3: 5.0, 6: 4.0, 9: 4.5}
    original = Trainer.evaluate

    def evaluate(self: Trainer, between: Callable[[], None]) -> dict[str, float]:
        return original(self, between) | {"val/loss": losses[self.step]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    train(run_of(tiny, tmp_path, "r", *EVALUATING, "keep_checkpoints=1"))
    kept = list_checkpoints(tmp_path / "r/checkpoints")
    assert [p.name for p in kept] == ["step_00000006", "step_00000009"]
    assert [load_record(p)["score"] for p in kept] == [4.0, 4.5]
    assert load_record(kept[1])["run"]["best_loss"] == 4.0


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_ends_the_run_as_failed(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    wild = [
        *DIVERGING,
        "lr_scheduler=constant",
        "lr_scheduler.warmup_fraction=0",
        "steps=2",
        "save_every=null",
    ]
    result = cli(*tiny, *wild, "optimizer=adam", "run_name=r")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "step 2: the validation loss is nan: stopped, there is no checkpoint yet" in result.stderr
    assert not (tmp_path / "outputs/r/summary.json").exists()
    assert json.loads((tmp_path / "outputs/r/run.json").read_text())["state"] == "failed"


def test_weights_that_are_not_finite_are_not_kept(tiny: list[str], tmp_path: Path) -> None:
    config = run_of(tiny, tmp_path, "r", "optimizer=adam", "save_every=2", "steps=6")
    original = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if self.step == 4:
            with torch.no_grad():
                self.model.lm_head.weight[0, 0] = float("nan")
        return result

    Trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        with pytest.raises(TrainingError) as raised:
            train(config)
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]
    assert "step_00000002; a lower" in str(raised.value)
    assert [p.name for p in list_checkpoints(tmp_path / "r/checkpoints")] == ["step_00000002"]
