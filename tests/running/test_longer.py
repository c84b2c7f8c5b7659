"""How long a run is: longer than another, whose rate then jumps, or epochs; and batches that it skips."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Cli
from helpers.run_folders import assert_same_tensors, history
from helpers.runs import compose, load_data

from rsotrain.config.identity import run_name
from rsotrain.config.schema import Config
from rsotrain.errors import StoppedEarly, TrainingError, UserError
from rsotrain.running.mode import train
from rsotrain.training.trainer import Trainer

ADAM = ["optimizer=adam", "optimizer.lr=0.01"]


def run_of(tiny: list[str], folder: Path, name: str, *extra: str) -> Config:
    chosen = dict(o.split("=", 1) for o in [*tiny, *ADAM, *extra])
    named = {"output_dir": folder, "run_name": name}
    return compose([f"{key}={value}" for key, value in (chosen | named).items()])


# --- longer than the run that it goes on from -------------------------------------------------------


def said_of_rates(run: Path) -> list[str]:
    return [line for line in (run / "train.log").read_text().splitlines() if "learning rate jumps" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "before", "after"),
    [
        # cosine: a tenth of the peak after all 6 steps; of 12 steps, 7 are done when this update is
        ("cosine", 0.001, 0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * 6 / 11)) / 2)),
        ("linear", 0.01 / 5, 0.01 * 6 / 11),  # the warm-up takes one step of each
    ],
)
def test_a_run_that_is_made_longer_says_how_the_rate_jumps(
    schedule: str, before: float, after: float, tiny: list[str], tmp_path: Path
) -> None:
    own = [f"lr_scheduler={schedule}", "lr_scheduler.warmup_steps=1"]
    train(run_of(tiny, tmp_path, "r", *own))
    train(run_of(tiny, tmp_path, "s", *own, "steps=12", f"checkpoint.path={tmp_path / 'r'}"))
    (said,) = said_of_rates(tmp_path / "s")
    assert (
        f"jumps from {before:.3g} in step 6 to {after:.3g}, {after / before:.3g} times as much:"
        " the schedule of this run, over 12 steps, is not that of the checkpoint"
    ) in said
    rates = [
        json.loads(line).get("train/lr") for line in (tmp_path / "s/metrics.jsonl").read_text().splitlines()
    ]
    assert rates[0] == pytest.approx(after)


@pytest.mark.slow
def test_a_run_whose_rate_goes_on_says_nothing(tiny: list[str], tmp_path: Path) -> None:
    for schedule, longer in (("constant", ["steps=12"]), ("cosine", ["steps=6", "eval_every=2"])):
        own = [f"lr_scheduler={schedule}"]
        train(run_of(tiny, tmp_path, schedule, *own))
        path = tmp_path / schedule / "checkpoints/step_00000004"
        train(run_of(tiny, tmp_path, f"{schedule}2", *own, *longer, f"checkpoint.path={path}"))
        assert said_of_rates(tmp_path / f"{schedule}2") == []


# --- epochs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_epochs_are_as_many_steps_as_the_data_say(tiny: list[str], tmp_path: Path, cache_dir: Path) -> None:
    config = run_of(tiny, tmp_path, "r", "epochs=0.015")
    sequences = load_data(config, cache_dir).train.sequences_per_epoch()
    steps = math.ceil(sequences * 0.015 / 4)
    assert steps != 6
    summary = train(config)
    assert summary["step"] == steps
    train(run_of(tiny, tmp_path, "s", f"steps={steps}"))
    last = f"checkpoints/step_{steps:08d}"
    assert_same_tensors(tmp_path / "r" / last, tmp_path / "s" / last)
    # the same run as the one of so many steps, by name, too
    unnamed = [o for o in [*tiny, *ADAM] if not o.startswith("steps=")]
    named = compose([*unnamed, f"output_dir={tmp_path}", f"steps={steps}"])
    assert train(compose([*unnamed, f"output_dir={tmp_path}", "epochs=0.015"]))["run"] == run_name(named)
    with pytest.raises(UserError, match="warmup_steps=100 must lie between 0 and steps="):
        train(run_of(tiny, tmp_path, "t", "epochs=0.015", "lr_scheduler.warmup_steps=100"))
    assert not (tmp_path / "t").exists()


def epochs_in(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["train/epoch"] for record in records if "train/epoch" in record]


def said_of_repeats(run: Path) -> list[str]:
    return [line for line in (run / "train.log").read_text().splitlines() if "begin to repeat" in line]


@pytest.mark.slow
def test_a_run_counts_its_epochs_and_says_once_when_the_data_repeat(tiny: list[str], tmp_path: Path) -> None:
    ten = [json.dumps({"text": f"document {i}: the ship sailed over the sea"}) for i in range(10)]
    (tmp_path / "ten.jsonl").write_text("\n".join(ten))
    padded = [f"data.path={tmp_path / 'ten.jsonl'}", "data.packing=padded", "tokenizer.vocab_size=290"]
    train(run_of(tiny, tmp_path, "r", *padded))
    assert epochs_in(tmp_path / "r") == [0.4, 0.8, 1.2, 1.6, 2.0, 2.4]
    said = ["step 3: the training data begin to repeat, since an epoch has 10 sequences"]
    assert said_of_repeats(tmp_path / "r") == said
    # an epoch that ends with a batch repeats nothing, be it the last batch, or the last before a restart
    train(run_of(tiny, tmp_path, "s", *padded, "batch_size=5", "steps=2"))
    assert said_of_repeats(tmp_path / "s") == []
    on = ["batch_size=5", "steps=4", f"checkpoint.path={tmp_path / 's'}"]
    train(run_of(tiny, tmp_path, "t", *padded, *on))
    assert said_of_repeats(tmp_path / "t") == said
    train(run_of(tiny, tmp_path, "u", *padded, "steps=8", f"checkpoint.path={tmp_path / 'r'}"))
    assert said_of_repeats(tmp_path / "u") == []  # they do since long


@pytest.mark.slow
def test_streamed_data_have_no_epochs_to_count(tiny: list[str], tmp_path: Path) -> None:
    train(run_of(tiny, tmp_path, "r", "data.streaming=true", "data.workers=1", "data.lanes=1", "steps=2"))
    assert epochs_in(tmp_path / "r") == []
    assert said_of_repeats(tmp_path / "r") == []


@pytest.mark.slow
def test_epochs_and_steps_are_not_both_given(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    refused = cli(*tiny, "epochs=0.015")
    assert refused.returncode == 2
    assert "steps=6 and epochs=0.015 both say how long the run is; give one of them" in refused.stderr
    assert not (tmp_path / "outputs").exists()
    done = cli(*[o for o in tiny if not o.startswith("steps=")], *ADAM, "epochs=0.001")
    assert done.returncode == 0, done.stderr
    assert "epochs=0.001 of" in done.stdout


# --- bad batches ------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    original = Trainer.forward

    def forward(self: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = original(self, inputs, targets)
        return loss * math.nan if self.position // self.config.batch_size in bad else loss

    monkeypatch.setattr(Trainer, "forward", forward)


def bad_steps(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/bad_steps"] for line in lines if "train/bad_steps" in line]


@pytest.mark.slow
def test_a_run_passes_over_bad_batches_and_says_so(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, {1, 4})
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is nan .*: stopped before the update, there is no"
    ):
        train(run_of(tiny, tmp_path, "none"))
    config = run_of(tiny, tmp_path, "r", "max_bad_steps=1")
    with pytest.raises(
        TrainingError, match=r"step 4: .*, and max_bad_steps=1 batches have been skipped: stopped"
    ):
        train(config)
    # more may be skipped without its being another run
    summary = train(run_of(tiny, tmp_path, "r", "max_bad_steps=2"))
    assert (summary["step"], summary["train/bad_steps"]) == (6, 2)
    assert bad_steps(tmp_path / "r") == [0, 1, 1, 2, 2, 2]
    said = (tmp_path / "r/train.log").read_text()
    assert (
        "warning: step 2: the loss is nan and the gradient norm nan: batch skipped (1 of at most 1)" in said
    )
    train(run_of(tiny, tmp_path, "straight", "max_bad_steps=7"))
    assert history(tmp_path / "r") == history(tmp_path / "straight")
    last = "checkpoints/step_00000006"
    assert_same_tensors(tmp_path / "r" / last, tmp_path / "straight" / last)


@pytest.mark.slow
def test_a_signal_is_heard_while_batches_are_skipped(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, set(range(1, 10**6)))
    with pytest.raises(StoppedEarly):
        train(run_of(tiny, tmp_path, "r", "max_bad_steps=1000000", "max_seconds=1"))
    assert "stopped by max_seconds=1 after step 1, everything saved" in (tmp_path / "r/train.log").read_text()
