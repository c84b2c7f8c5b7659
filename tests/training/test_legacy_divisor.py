"""The number of the published tables beside the right one: by hand, on any number of ranks, where it goes."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ranks
from helpers.runs import compose, load_data, trainer

from rsotrain.cli.dispatch import run_mode
from rsotrain.config.schema import Config
from rsotrain.config.validation import validate
from rsotrain.data.build import Data
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.errors import UserError
from rsotrain.parallel.ranks import World
from rsotrain.training.trainer import Trainer

LEGACY = ["data.packing=padded", "evaluation.legacy_divisor=true"]


def by_hand(trained: Trainer, size: int) -> float:
    """What the shared code does, batch by batch, but for the cut at ``evaluation.max_tokens``."""
    total, count = 0.0, 1  # that 1 is the flaw
    with torch.no_grad():
        for inputs, targets in trained.data.validation.evaluation_batches(size):
            logits = trained.model(inputs).flatten(0, 1).float()
            total += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX).item()
            count += 1
    return total / count


@pytest.mark.parametrize("size", [1, 3, 64])
def test_it_is_the_sum_of_batch_means_over_one_batch_too_many(
    size: int, tiny: list[str], cache_dir: Path
) -> None:
    # 20 documents, so with 3 the last batch is short, and with 64 there is one: half the loss
    trained = trainer([*tiny, *LEGACY, f"evaluation.micro_batch_size={size}"], cache_dir)
    found = trained.evaluate()
    # the same fp32 logits, summed in another order
    assert found["val/legacy_loss"] == pytest.approx(by_hand(trained, size), rel=1e-5)
    assert found["val/legacy_perplexity"] == pytest.approx(math.exp(found["val/legacy_loss"]))
    batches = math.ceil(20 / size)
    # batches of these documents differ little in their means, so the divisor is nearly all of it
    assert found["val/legacy_loss"] == pytest.approx(found["val/loss"] * batches / (batches + 1), rel=1e-2)
    right = trainer([*tiny, *LEGACY[:1], f"evaluation.micro_batch_size={size}"], cache_dir).evaluate()
    assert right == {name: value for name, value in found.items() if "legacy" not in name}


def evaluated(config: Config, data: Data, world: World) -> dict[str, float]:
    return Trainer(config, data, world).evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_it_is_the_same_on_any_number_of_ranks(
    size: int, tiny: list[str], cache_dir: Path, tmp_path: Path
) -> None:
    # 7 batches of 3: neither 2 nor 3 ranks share them evenly
    overrides = [*tiny, *LEGACY, "evaluation.micro_batch_size=3", "batch_size=12", "precision=fp32"]
    alone = trainer(overrides, cache_dir).evaluate()
    config = compose([*overrides, "parallelism=fsdp"])
    data = load_data(config, cache_dir)
    found = ranks.run(size, {"evaluated": partial(evaluated, config, data)}, tmp_path)
    for metrics in ranks.succeeded(found["evaluated"]):
        assert metrics == pytest.approx(alone, rel=1e-6)  # the same batches, summed in another order


@pytest.mark.slow
def test_it_is_logged_summarised_and_evaluated(tiny: list[str], tmp_path: Path) -> None:
    # not part of the identity of a run: mode=evaluate finds it without being told to train so
    command = [*tiny, LEGACY[0], f"output_dir={tmp_path}", "eval_every=2", "evaluation.micro_batch_size=3"]

    def run(*more: str) -> dict[str, Any]:
        config = compose([*command, *more])
        validate(config)
        return run_mode(config)

    returned = run(LEGACY[1], "logger=jsonl")
    (folder,) = tmp_path.glob("*-seed0-*")
    summary = json.loads((folder / "summary.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    recorded = [r for r in history if "val/loss" in r]
    assert [r["step"] for r in recorded] == [2, 4, 6]
    assert all(r["val/legacy_perplexity"] < r["val/perplexity"] for r in recorded)
    names = ("val/legacy_loss", "val/legacy_perplexity")
    assert [summary[n] for n in names] == [returned[n] for n in names] == [recorded[-1][n] for n in names]
    assert "legacy" in (folder / "train.log").read_text()
    again = run(LEGACY[1], "mode=evaluate")
    assert [again[n] for n in names] == pytest.approx([summary[n] for n in names], rel=1e-6)
    assert not any("legacy" in name for name in run("mode=evaluate"))


def test_it_is_refused_without_a_size_of_batches(tiny: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"depends on their size; give that with evaluation\.micro_batch_size"
    ):
        validate(compose([*tiny, *LEGACY]))
    validate(compose([*tiny, *LEGACY, "evaluation.micro_batch_size=4"]))
