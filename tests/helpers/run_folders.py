"""What a run leaves in its folder, and a way to stop one in the middle."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rsotrain.checkpoints.files import load_tensors
from rsotrain.config.schema import Config
from rsotrain.parallel.ranks import World
from rsotrain.running.mode import train
from rsotrain.training.trainer import StepResult, Trainer


def assert_same_tensors(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys()
        assert all(left[k].equal(right[k]) for k in left)


def stopping(config: Config, step: int, rank: int, world: World) -> int | str | None:
    """Train; ``rank`` is sent SIGUSR1 during ``step``. The exit status that it leads to."""
    original = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> StepResult:
        if self.step + 1 == step and self.world.rank == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *arguments)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        train(config)
    except SystemExit as stopped:
        return stopped.code
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]
    return 0


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_tensors(run / "checkpoints" / f"step_{step:08d}", "model")


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:  # fp32 rounding through 8 updates and 3 refreshes
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-3)


def reseal(checkpoint: Path) -> None:
    """Give a checkpoint that was changed by hand the checksums that its files have now."""
    names = json.loads((checkpoint / "checksums.json").read_text())
    fresh = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / "checksums.json").write_text(json.dumps(fresh))


def history(run: Path) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` says of training and evaluation, line by line, without times."""
    pick = ("step", "tokens", "train/loss", "val/loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in pick if key in line} for line in lines]
