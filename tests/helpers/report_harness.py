"""What the tests of reports share: invented run folders, and the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rsotrain.report.cli import build_parser, report

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a run folder of four evaluated steps, whose validation loss ends at ``loss``.

    ``metrics``: more of them, or others, each a value or a function of the step.
    """

    def write(
        name: str,
        loss: float = 2.0,
        *,
        finished: bool = True,
        record: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        config: dict[str, Any] = {
            "steps": 40, "seed": 0, "seq_len": 32, "run_name": name, "model": {"name": "llama_tiny"},
            "optimizer": {"name": "adam", "lr": 0.01}, "sampler": {"name": "none"},
            "data": {"name": "embedded"}, "tokenizer": {"name": "trained"},
        }  # fmt: skip
        for key, value in settings.items():
            group, _, inner = key.partition("__")
            if inner:
                config[group][inner] = value
            else:
                config[key] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        steps = (10, 20, 30, 40) if finished else (10, 20)
        lines = [
            {
                "step": step, "tokens": 100 * step, "time": step / 2, "train/loss": loss + 41 - step,
                "val/loss": loss + 40 - step, "throughput/tokens_per_second": 200.0, "subspace/overlap": 0.5,
                "memory/parameters_bytes": 1000, "memory/gradients_bytes": 1000, "memory/peak_bytes": 5000,
            }
            for step in steps
        ]  # fmt: skip
        for line in lines:
            line |= {k: v(line["step"]) if callable(v) else v for k, v in (metrics or {}).items()}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text(json.dumps(record or {"run_id": name}))
        if finished:
            (folder / "summary.json").write_text(json.dumps({"finished": True, **lines[-1]}))
        return folder

    return write


def call(*arguments: str | Path) -> None:
    report(build_parser().parse_args([str(a) for a in arguments]))
