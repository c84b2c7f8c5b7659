"""From a command line to a configuration, its data and its trainer."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.command import ROOT
from hydra.core.config_store import ConfigStore

from rsotrain.cli.compose import register_schemas, to_config
from rsotrain.config.defaults import conf_dir
from rsotrain.config.schema import Config, Precision
from rsotrain.data.build import Data, build_data
from rsotrain.training.trainer import Trainer

PRECISIONS = [precision for precision in Precision if precision is not Precision.auto]
OPTIMIZERS = sorted(p.stem for p in (ROOT / "conf" / "optimizer").glob("*.yaml"))
# One of each kind of state, of gradient and of sharding. What takes seconds for each method, `make test` does
# with these and `make test-slow` with the others.
KINDS = ("adam", "carry", "foam", "galore", "lora", "muon", "rso", "rso_pca", "sn_sm")
EACH_OPTIMIZER = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in OPTIMIZERS]


_schemas: Any = None  # as this module has registered them last


def compose(overrides: list[str]) -> Config:
    """The configuration of a command line; composed once, unless it reads a model's folder.

    Its ``precision=auto`` is bf16_mixed on every machine.
    """
    if any("pretrained" in override for override in overrides):
        return _compose(tuple(overrides))
    return deepcopy(_composed(tuple(overrides)))


def _compose(overrides: tuple[str, ...]) -> Config:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    global _schemas
    repository = ConfigStore.instance().repo
    if repository.get("schema") is not _schemas or _schemas is None:
        register_schemas()
        _schemas = repository["schema"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = to_config(hydra_compose("config", list(overrides)))
    if config.precision is Precision.auto:
        return replace(config, precision=Precision.bf16_mixed)
    return config


_composed = cache(_compose)


def load_data(config: Config, cache_dir: Path) -> Data:
    return build_data(
        config.data, config.tokenizer, seq_len=config.seq_len, cache_dir=cache_dir, notify=lambda _: None
    )


def trainer(overrides: list[str], cache_dir: Path) -> Trainer:
    config = compose(overrides)
    return Trainer(config, load_data(config, cache_dir))


# Diverges within the ranges of the settings: a step multiplies attention and MLP weights by −10¹².
DIVERGING = ("optimizer.lr=1000", "optimizer.scale=1000000", "optimizer.weight_decay=1000")
