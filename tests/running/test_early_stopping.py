"""Evaluation before the first step, and training that ends when evaluations get no better."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.run_folders import assert_same_tensors, history, stopping
from helpers.runs import compose, trainer

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.config.data import EvaluationConfig
from rsotrain.config.schema import Config
from rsotrain.config.validation import validate
from rsotrain.errors import UserError
from rsotrain.parallel.ranks import World
from rsotrain.running.early_stopping import Patience
from rsotrain.running.mode import train
from rsotrain.training.trainer import Trainer

LOSSES = {2: 5.0, 4: 4.0, 6: 3.995, 8: 4.1, 10: 3.98, 12: 3.0}
RUN = ["optimizer=adam", "steps=12", "eval_every=2", "save_every=3"]
PATIENT = [*RUN, "evaluation.patience=2", "evaluation.min_delta=0.01"]


def run_of(tiny: list[str], folder: Path, name: str, *extra: str) -> Config:
    chosen = dict(o.split("=", 1) for o in [*tiny, *extra])
    named = {"output_dir": folder, "run_name": name}
    return compose([f"{key}={value}" for key, value in (chosen | named).items()])


@pytest.fixture
def given_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.evaluate

    def evaluate(self: Trainer, *arguments: object) -> dict[str, float]:
        return original(self, *arguments) | {"val/loss": LOSSES[self.step]}  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_patience_counts_evaluations_that_are_not_better_by_the_margin() -> None:
    config = EvaluationConfig(patience=2, min_delta=0.01)
    state, found = Patience(), []
    for loss in LOSSES.values():
        state = state.after(loss, config)
        found.append((state.best, state.waited, bool(state.ended(config))))
    assert found == [
        (5.0, 0, False), (4.0, 0, False), (4.0, 1, False), (4.0, 2, True), (3.98, 0, False), (3.0, 0, False),
    ]  # fmt: skip
    assert not Patience(1.0, 99).ended(EvaluationConfig())


@pytest.mark.slow
def test_training_ends_when_evaluations_get_no_better(
    tiny: list[str], tmp_path: Path, given_losses: None
) -> None:
    summary = train(run_of(tiny, tmp_path, "r", *PATIENT))
    why = "2 evaluations in a row were no better than a loss of 4.0000 by more than 0.01"
    assert (summary["step"], summary["ended"], summary["finished"]) == (8, why, True)
    assert summary["best/val/loss"] == 3.995
    assert json.loads((tmp_path / "r/summary.json").read_text())["ended"] == why
    assert f"stopped early after step 8: {why}" in (tmp_path / "r/train.log").read_text()
    assert list_checkpoints(tmp_path / "r/checkpoints")[-1].name == "step_00000008"
    again = train(run_of(tiny, tmp_path, "r", *PATIENT))  # it is finished
    assert again["ended"] == why
    assert train(run_of(tiny, tmp_path, "s", *RUN))["ended"] == "all 12 steps"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, *(pytest.param(step, marks=pytest.mark.long) for step in (6, 7, 8))])
def test_what_patience_remembers_is_in_the_checkpoint(
    stop: int, tiny: list[str], tmp_path: Path, given_losses: None
) -> None:
    train(run_of(tiny, tmp_path, "straight", *PATIENT))
    config = run_of(tiny, tmp_path, "r", *PATIENT)
    # a step with an evaluation: it is left, and repeated by the next start
    assert stopping(config, stop, 0, World(torch.device("cpu"))) == 75
    assert train(config)["step"] == 8
    assert history(tmp_path / "r") == history(tmp_path / "straight")
    last = "checkpoints/step_00000008"
    assert_same_tensors(tmp_path / "r" / last, tmp_path / "straight" / last)


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_evaluation_ends_at_once(
    tiny: list[str], tmp_path: Path, given_losses: None
) -> None:
    config = run_of(tiny, tmp_path, "r", *PATIENT, "save_every=2")
    train(config)
    (tmp_path / "r/summary.json").unlink()
    before = history(tmp_path / "r")
    assert train(config)["step"] == 8
    assert history(tmp_path / "r") == before


@pytest.mark.slow
def test_a_run_from_a_checkpoint_has_patience_of_its_own(
    tiny: list[str], tmp_path: Path, given_losses: None
) -> None:
    train(run_of(tiny, tmp_path, "r", *PATIENT))
    longer = [*PATIENT, f"checkpoint.path={tmp_path / 'r'}"]
    assert train(run_of(tiny, tmp_path, "s", *longer))["step"] == 12


@pytest.mark.slow
def test_an_evaluation_before_the_first_step(tiny: list[str], tmp_path: Path, cache_dir: Path) -> None:
    own = [*RUN, "steps=3", "eval_every=3"]
    plain = run_of(tiny, tmp_path, "plain", *own)
    train(plain)
    config = run_of(tiny, tmp_path, "r", *own, "evaluation.at_start=true")
    train(config)
    without = [line for line in history(tmp_path / "r") if line["step"] > 0]
    assert without == history(tmp_path / "plain")
    (first,) = [line for line in history(tmp_path / "r") if line["step"] == 0]
    fresh = trainer([*tiny, "optimizer=adam"], cache_dir)
    assert first["val/loss"] == fresh.evaluate()["val/loss"]


@pytest.mark.slow
def test_an_evaluation_before_the_first_step_is_repeated_where_it_was_left(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tiny, tmp_path, "r", *RUN, "evaluation.at_start=true")
    original = Trainer.evaluate

    def evaluate(self: Trainer, between: Callable[[], None]) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, between)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", evaluate)
        with pytest.raises(SystemExit):
            train(config)
    train(config)
    assert [line["step"] for line in history(tmp_path / "r") if "val/loss" in line][:2] == [0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.patience=2"], "evaluation.patience=2 counts evaluations, but eval_every=null"),
        (["evaluation.min_delta=0.1"], "evaluation.min_delta=0.1 has no effect without evaluation.patience"),
        (["spike_factor=3"], "spike_factor=3.0 says which batches to skip, but max_bad_steps=0 skips none"),
        (
            ["optimizer.decay_norms_and_embeddings=true"],
            "decay_norms_and_embeddings=true has no effect without optimizer.weight_decay",
        ),
        (["epochs=2", "data.streaming=true"], "how many sequences an epoch has is not known"),
        (["epochs=2", "mode=plan"], "epochs=2.0 is for mode=train"),
    ],
)
def test_settings_without_effect_are_refused(settings: list[str], message: str, tiny: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        validate(compose([*tiny, *settings]))
