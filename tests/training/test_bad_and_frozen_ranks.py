"""Skipped batches, frozen parameters and early stopping on two ranks."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.run_folders import assert_near, history, weights
from helpers.runs import compose, load_data

from rsotrain.config.schema import Config
from rsotrain.optim.formulas import state_bytes
from rsotrain.parallel.ranks import World
from rsotrain.running.mode import train
from rsotrain.training.trainer import Trainer

METHODS = ["adam", "galore", "muon", "rso_pca"]
# a whole block, whose gradients no rank waits for, and parts of another
FROZEN = ["embed_tokens", r"layers\.0\.", r"layers\.1\.mlp\.up_proj", r"\.q_proj\."]
LOSSES = {2: 4.0, 4: 4.1, 6: 3.0}


def with_bad_batch(config: Config, world: World) -> float:
    """The loss of the third batch is not finite on rank 1 alone."""
    original = Trainer.forward

    def forward(self: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = original(self, inputs, targets)
        third = self.position // self.config.batch_size == 2
        return loss * math.nan if third and world.rank == world.size - 1 else loss

    Trainer.forward = forward  # type: ignore[method-assign]
    try:
        return train(config)["train/bad_steps"]
    finally:
        Trainer.forward = original  # type: ignore[method-assign]


def without_progress(config: Config, world: World) -> int:
    original = Trainer.evaluate

    def evaluate(self: Trainer, *arguments: Any) -> dict[str, float]:
        return original(self, *arguments) | {"val/loss": LOSSES[self.step]}

    Trainer.evaluate = evaluate  # type: ignore[method-assign]
    try:
        return train(config)["step"]
    finally:
        Trainer.evaluate = original  # type: ignore[method-assign]


def state_of(config: Config, cache_dir: Path, world: World) -> int:
    """Bytes of the optimizer state on this rank."""
    return Trainer(config, load_data(config, cache_dir), world).optimizer.state_bytes()


@pytest.mark.slow
def test_two_ranks_do_as_one(tiny: list[str], tmp_path: Path, cache_dir: Path) -> None:
    frozen = ",".join(f"'{pattern}'" for pattern in FROZEN)

    def config(name: str, *extra: str) -> Config:
        chosen = dict(o.split("=", 1) for o in [*tiny, "optimizer.eps=1e-4", *extra])
        named = {"output_dir": tmp_path, "run_name": name}
        return compose([f"{key}={value}" for key, value in (chosen | named).items()])

    def both(name: str, *extra: str) -> tuple[Config, Config]:
        return config(f"{name}1", *extra), config(f"{name}2", *extra, "parallelism=fsdp")

    bad = {
        f"bad {m}": both(f"bad {m}", f"optimizer={m}", "optimizer.update_proj_gap=2", "max_bad_steps=2")
        for m in ("galore", "rso_pca")
    }
    early = both("early", "optimizer=adam", "eval_every=2", "evaluation.patience=1")
    runs = {
        m: both(m, f"optimizer={m}", f"model.freeze=[{frozen}]", "optimizer.weight_decay=0.1")
        for m in METHODS
    }
    checks: dict[str, ranks.Check] = {
        **{name: partial(with_bad_batch, two) for name, (_, two) in bad.items()},
        "early": partial(without_progress, early[1]),
        **{m: lambda world, c=two: train(c)["step"] for m, (_, two) in runs.items()},  # type: ignore[misc]
        **{f"state {m}": partial(state_of, two, cache_dir) for m, (_, two) in runs.items()},
    }
    alone = World(torch.device("cpu"))
    for one, _ in bad.values():
        assert with_bad_batch(one, alone) == 1
    assert without_progress(early[0], alone) == 4
    for one, _ in runs.values():
        train(one)
    outcomes = {name: ranks.succeeded(o) for name, o in ranks.run(2, checks, tmp_path / "out").items()}
    assert [outcomes[name] for name in bad] == [[1, 1], [1, 1]]
    assert outcomes["early"] == [4, 4]
    for name, step in (*((b, 6) for b in bad), ("early", 4), *((m, 6) for m in METHODS)):
        one, two = tmp_path / f"{name}1", tmp_path / f"{name}2"
        assert_near(weights(one, step), weights(two, step))
        a, b = history(one), history(two)
        assert [line["step"] for line in a] == [line["step"] for line in b]
        assert [line["tokens"] for line in a] == [line["tokens"] for line in b]
    start = dict(Trainer(runs["adam"][0], load_data(runs["adam"][0], cache_dir)).model.named_parameters())
    for method, (_, two) in runs.items():
        for name, weight in weights(tmp_path / f"{method}2", 6).items():
            is_frozen = any(re.search(pattern, name) for pattern in FROZEN)
            assert torch.equal(weight, start[name]) == is_frozen, (method, name)
        planned = replace(two, parallelism=replace(two.parallelism, world_size=2))
        vocab = start["lm_head.weight"].shape[0]
        assert outcomes[f"state {method}"][0] == state_bytes(planned, vocab).total
    assert math.isfinite(history(tmp_path / "bad rso_pca2")[-1]["val/loss"])
    with pytest.raises(FileNotFoundError):
        weights(tmp_path / "early2", 6)
