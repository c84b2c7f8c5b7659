"""What makes a run what it is: the settings that its weights depend on, its name and its folders."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsotrain.config.keys import flatten, later_fields, later_fields_of, plain
from rsotrain.config.later import Later
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.config.schema import Config

# What can change between two starts of one run, since the weights do not depend on it.
OPERATIONAL_KEYS = (
    "mode", "output_dir", "run_name", "overwrite", "cache_dir", "max_seconds", "keep_checkpoints",
    "save_every", "log_every", "max_bad_steps", "logger", "parallelism", "micro_batch_size",
    "optimizer.update_in_backward", "generate", "export", "benchmark", "report", "tune", "data.workers",
    "evaluation.samples", "evaluation.tasks", "evaluation.tasks_path", "evaluation.num_fewshot",
    "evaluation.task_limit", "evaluation.micro_batch_size", "evaluation.legacy_divisor",
)  # fmt: skip
# The same, but they take part in the names that are made from settings, as they always did. With the run_name
# of a run they may change in its folder.
FREE_KEYS = ("eval_every", "evaluation.max_tokens", "activation_checkpointing")


def identity(config: Config) -> dict[str, Any]:
    """Dotted key -> value of the settings that make a run what it is."""
    return identity_of(plain(config), config)


def identity_of(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """``identity`` of what a ``config.yaml`` holds, be it older than some of the fields of ``config``.

    A field that is as it was before it existed is left out.
    """
    return _identity(settings, {key: field.before for key, field in later_fields(config).items()}, config)


def _identity(settings: dict[str, Any], left_out: dict[str, Any], config: Config) -> dict[str, Any]:
    flat, later = dict(flatten(settings)), later_fields(config)
    if flat.get("compile") is None:  # not settled, as where nothing is trained; once it was false
        flat["compile"] = False
    return {
        key: value
        for key, value in flat.items()
        if key not in OPERATIONAL_KEYS
        and key.split(".")[0] not in OPERATIONAL_KEYS
        and not (key in later and (value == left_out[key] or not _matters(later[key], flat)))
    }


def _matters(field: Later, flat: Mapping[str, Any]) -> bool:
    return not field.matters_with or bool(flat.get(field.matters_with))


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what a ``config.yaml`` holds, with the fields that it is too old for."""
    flat = dict(flatten(settings))
    missing = {key: field for key, field in later_fields_of(flat).items() if key not in flat}
    return flat | {
        key: field.before if _matters(field, flat) else field.default for key, field in missing.items()
    }


def as_before(settings: dict[str, Any], config: Config) -> dict[str, Any]:
    """Dotted key -> value of the fields in which the run that left ``settings`` must differ from ``config``.

    It is older than these fields, did something else than new runs do by default, and ``config`` has what
    these do: the run is to go on as it began.
    """
    old, now = dict(flatten(settings)), dict(flatten(plain(config)))
    return {
        key: field.before
        for key, field in later_fields(config).items()
        if key not in old
        and field.before != field.of_new_runs
        and now[key] == field.of_new_runs
        and _matters(field, now)
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first three settings that differ between two identities, in words; empty where none does."""
    differing = sorted(differing_settings(old, new).items())
    return ", ".join(f"{key}: {there} there, {here} here" for key, (there, here) in differing[:3])


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new value) of the settings that weights depend on in which two identities differ."""
    there, here = (json.loads(json.dumps(dict(settings), default=str)) for settings in (old, new))
    keys = (there.keys() | here.keys()) - set(FREE_KEYS)
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


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
    defaults = {key: field.default for key, field in later_fields(config).items()}
    named = _identity(plain(config), defaults, config)
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    others = dict.fromkeys(str(group.get("optimizer")) for group in config.optimizer.groups)
    parts = [config.model.name, "+".join([config.optimizer.name, *others])]
    if not isinstance(config.sampler, NoSamplerConfig):
        parts.append(config.sampler.name)
    return "-".join([*parts, f"seed{config.seed}", digest])


def cache_dir(config: Config) -> Path:
    """Where tokenizers and tokens are kept between runs."""
    given = config.cache_dir or os.environ.get("RSOTRAIN_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsotrain"
