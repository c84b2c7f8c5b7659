"""What the user says of W&B: the configuration wins over the environment, and that over our defaults.

W&B itself reads WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES, WANDB_JOB_TYPE and
many more, and the files that `wandb init` writes. What the configuration leaves open is left to it.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from rsotrain.config.schema import LoggerConfig, WandbMode
from rsotrain.errors import require

DEFAULT_PROJECT = "rsotrain"
DEFAULT_INIT_TIMEOUT_SECONDS = 30.0
# What wandb itself takes in WANDB_MODE, its two older names included. None: disabled.
MODES = {
    "online": WandbMode.online,
    "run": WandbMode.online,
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "shared": WandbMode.shared,
    "disabled": None,
}
_TRUE = ("1", "true", "yes", "on", "y", "t")  # WANDB_DISABLED is Hugging Face's, and they take these
# Of wandb's settings, unless the user sets them: it is to keep quiet, and to send numbers and no files.
_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "label_disable": True,
}


def resolve_mode(config: LoggerConfig, environment: Mapping[str, str] = os.environ) -> WandbMode | None:
    """None where there is to be no W&B at all.

    ``WANDB_MODE=disabled`` and ``WANDB_DISABLED=true`` switch it off whatever the configuration says. Raises
    UserError where W&B is asked for and the environment names no mode.
    """
    name = environment.get("WANDB_MODE", "")
    if not config.wandb or name == "disabled" or environment.get("WANDB_DISABLED", "").lower() in _TRUE:
        return None
    if config.wandb_mode is not None:
        return None if config.wandb_mode is WandbMode.disabled else config.wandb_mode
    require(
        not name or name in MODES,
        f"WANDB_MODE={name} is not a mode of W&B; set it to online, offline, shared or disabled",
    )
    return MODES[name] if name else WandbMode.auto


def init_timeout_seconds(config: LoggerConfig, environment: Mapping[str, str] = os.environ) -> float:
    """Raises UserError for a ``WANDB_INIT_TIMEOUT`` that is no number of seconds."""
    if config.wandb_init_timeout_seconds is not None:
        return config.wandb_init_timeout_seconds
    text = environment.get("WANDB_INIT_TIMEOUT") or str(DEFAULT_INIT_TIMEOUT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    require(0 < seconds <= 10**5, f"WANDB_INIT_TIMEOUT={text} must be a number of seconds, at most 100_000")
    return seconds


def own_settings(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Those of wandb's settings that ours decide, since no variable does."""
    settings = {k: v for k, v in _SETTINGS.items() if f"WANDB_{k.upper()}" not in environment}
    if "save_code" not in settings:
        settings.pop("disable_code", None)  # whoever saves code has not disabled it
    return settings


def own_arguments(run_dir: str, run_name: str, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Those of wandb.init's arguments that are the run's, since no variable says otherwise."""
    arguments = {"dir": run_dir, "name": run_name, "resume": "allow"}
    return {k: v for k, v in arguments.items() if not environment.get(f"WANDB_{k.upper()}")}
