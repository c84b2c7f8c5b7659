"""What the modes demand of the settings that they read, and of those that they do not."""

import os
from collections.abc import Iterable
from pathlib import Path

from rsotrain.config.processes import processes
from rsotrain.config.schema import Config, LoadWhat, Mode
from rsotrain.errors import require

# Of a mode that acts on checkpoint.path: the keys and groups that it reads. The model, its tokenizer and
# whatever else made it what it is are those of the checkpoint.
_OPEN = ("mode", "checkpoint.path", "device", "experiment", "logger", "hydra")
_READ = {
    Mode.evaluate: (
        *_OPEN, "data", "evaluation", "precision", "seq_len", "batch_size", "micro_batch_size", "cache_dir",
    ),
    Mode.generate: (*_OPEN, "generate", "precision", "seed"),
    Mode.export: (*_OPEN, "export", "overwrite"),
}  # fmt: skip

# What the training step on random tokens does not depend on, and of that what it does.
_NOT_BENCHMARKED = (
    "data", "evaluation", "eval_every", "save_every", "keep_checkpoints", "log_every", "max_seconds",
    "cache_dir", "overwrite", "checkpoint", "generate", "export", "report",
)  # fmt: skip
_BENCHMARKED = ("data.packing",)


def _among(key: str, names: Iterable[str]) -> bool:
    """Is ``key`` one of ``names``, or in a group of that name?"""
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in names)


def check_read(config: Config, given: Iterable[str]) -> None:
    """Raise UserError for the first of the keys and groups ``given`` that the mode would not look at."""
    keys = list(given)
    for key in keys:
        for mode in (Mode.benchmark, Mode.tune):
            require(
                config.mode is mode or not _among(key, [mode.name]),
                f"{key} is for mode={mode.name}; leave it out of mode={config.mode.name}",
            )
        if config.mode is not Mode.benchmark:
            continue
        require(
            _among(key, _BENCHMARKED) or not _among(key, _NOT_BENCHMARKED),
            f"mode=benchmark times training steps on random tokens, so {key} would do nothing; leave it out"
            + ("; data.packing=padded has padded ones" if _among(key, ["data"]) else ""),
        )
    if config.checkpoint.path is None or config.mode not in _READ:
        return
    read = _READ[config.mode]
    for key in keys:
        require(
            _among(key, read),
            f"mode={config.mode.name} takes everything but what it reads from checkpoint.path, so {key} would"
            f" do nothing; leave it out (it reads {', '.join(n for n in read if n not in _OPEN)})",
        )


def validate_modes(config: Config) -> None:
    """Raise UserError for what the mode does not read."""
    generate, evaluation = config.generate, config.evaluation
    require(bool(generate.prompts), "generate.prompts is empty; give at least one, such as ['The ']")
    require(
        not evaluation.legacy_divisor or evaluation.micro_batch_size is not None,
        "evaluation.legacy_divisor=true averages averages of batches, so its number depends on their size;"
        " give that with evaluation.micro_batch_size=…",
    )
    for name in ("tasks_path", "num_fewshot", "task_limit"):
        require(
            getattr(evaluation, name) is None or bool(evaluation.tasks),
            f"evaluation.{name} has no effect without evaluation.tasks=[…]",
        )
    require(
        not evaluation.tasks or config.mode is Mode.evaluate,
        "evaluation.tasks is for mode=evaluate; give the run there with checkpoint.path=…",
    )
    require(
        config.checkpoint.load is LoadWhat.all or config.mode in (Mode.train, Mode.plan),
        "checkpoint.load=weights is for training; the other modes take nothing else",
    )
    require(
        config.mode in (Mode.train, Mode.benchmark, Mode.tune) or processes().size == 1,
        f"mode={config.mode.name} is for one process; start one",
    )
    require(
        config.model.init_from is None or config.checkpoint.path is None or config.mode is not Mode.train,
        "model.init_from and checkpoint.path both give the first weights; leave one of them out",
    )
    require(
        config.mode is Mode.export or (config.export.path is None and config.export.dtype is None),
        "export.path and export.dtype are for mode=export",
    )
    require(
        config.mode is Mode.benchmark or not config.benchmark.profile,
        "benchmark.profile=true is for mode=benchmark",
    )
    require(
        config.mode is not Mode.benchmark or config.checkpoint.path is None,
        "mode=benchmark times a fresh model, so checkpoint.path would do nothing; leave it out",
    )
    if config.model.init_from is not None:
        folder = Path(config.model.init_from).expanduser()
        require(os.path.isfile(folder / "config.json"), f"model.init_from={folder} holds no config.json")
