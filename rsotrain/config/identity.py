"""What makes a run what it is: the settings that its weights depend on, its name and its folders."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsotrain.config.keys import flatten, later_defaults, later_defaults_of, plain
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.config.schema import Config

# What can change between two starts of one run, since the weights do not depend on it.
OPERATIONAL_KEYS = (
    "mode", "output_dir", "run_name", "overwrite", "cache_dir", "max_seconds", "keep_checkpoints",
    "save_every", "log_every", "logger", "parallelism", "micro_batch_size", "generate", "export", "benchmark",
    "report", "data.workers", "evaluation.samples", "evaluation.tasks", "evaluation.tasks_path",
    "evaluation.num_fewshot", "evaluation.task_limit", "evaluation.micro_batch_size",
    "evaluation.legacy_divisor",
)  # fmt: skip


def identity(config: Config) -> dict[str, Any]:
    """Dotted key -> value of the settings that make a run what it is."""
    return identity_of(plain(config), config)


def identity_of(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """``identity`` of what a ``config.yaml`` holds, be it older than some of the fields of ``config``."""
    defaults = later_defaults(config)
    return {
        key: value
        for key, value in flatten(settings)
        if key not in OPERATIONAL_KEYS
        and key.split(".")[0] not in OPERATIONAL_KEYS
        and not (key in defaults and value == defaults[key])
    }


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what a ``config.yaml`` holds, with the fields that it is too old for."""
    flat = dict(flatten(settings))
    return flat | {key: value for key, value in later_defaults_of(flat).items() if key not in flat}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first three settings that differ between two identities, in words; empty where none does."""
    there, here = (json.loads(json.dumps(dict(settings), default=str)) for settings in (old, new))
    differing = [k for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k)]
    return ", ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in differing[:3])


def run_folder_path(config: Config) -> Path:
    """Where the run of these settings lies, or would."""
    return Path(config.output_dir).expanduser() / run_name(config)


def run_name(config: Config) -> str:
    """``run_name``, or model-optimizer-sampler-seed and a hash of the settings.

    A member of a W&B sweep adds its run's id: the sweep may try the same settings twice, and wants to hear
    of both.
    """
    member = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return "-".join([_name_of_settings(config), *([member] if member else [])])


def _name_of_settings(config: Config) -> str:
    if config.run_name is not None:
        return config.run_name
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
    parts = [config.model.name, config.optimizer.name]
    if not isinstance(config.sampler, NoSamplerConfig):
        parts.append(config.sampler.name)
    return "-".join([*parts, f"seed{config.seed}", digest])


def cache_dir(config: Config) -> Path:
    """Where tokenizers and tokens are kept between runs."""
    given = config.cache_dir or os.environ.get("RSOTRAIN_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsotrain"
