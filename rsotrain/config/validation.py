"""Everything that can be refused before any work is done: ranges, rules between settings, names, folders."""

import os

from rsotrain.config.groups import method_groups
from rsotrain.config.identity import run_name
from rsotrain.config.processes import processes
from rsotrain.config.ranges import check_ranges
from rsotrain.config.rules import (
    validate_checkpoint,
    validate_lr_scheduler,
    validate_model,
    validate_parallelism,
    validate_training,
    validate_update_in_backward,
    validate_weight_rounding,
)
from rsotrain.config.rules_data import validate_data, validate_tokenizer
from rsotrain.config.rules_modes import validate_modes
from rsotrain.config.schema import Config, Mode
from rsotrain.config.text import NAME_BYTES, check_folder, check_name, check_path, check_text
from rsotrain.errors import require


def validate(config: Config) -> None:
    """Raise UserError with one sentence for the first rule that ``config`` breaks.

    Ranks too large, and which samplers an optimizer takes, are for ``optim/build.py`` to refuse.
    """
    check_ranges(config)
    check_text(config)
    validate_parallelism(config, processes().size)
    validate_model(config.model)
    method_groups(config.optimizer)
    validate_weight_rounding(config)
    validate_update_in_backward(config)
    longest = config.model.max_position_embeddings
    require(
        config.seq_len <= longest
        or config.mode in (Mode.evaluate, Mode.generate, Mode.export),  # another model
        f"seq_len={config.seq_len} is longer than model.max_position_embeddings={longest};"
        " shorten the sequences or raise the model's maximum",
    )
    if config.epochs is None:  # else the steps are not known yet
        validate_lr_scheduler(config.lr_scheduler, config.steps)
    validate_training(config)
    validate_data(config)
    validate_tokenizer(config.tokenizer, config.model)
    validate_modes(config)
    validate_checkpoint(config)
    _check_names(config)
    check_folder("output_dir", config.output_dir)
    _check_cache(config)
    require(
        config.report.path is not None or not config.report.claims,
        "report.claims=true is a part of the report; give the folder for it with report.path=…",
    )
    if config.report.path is not None:
        check_folder("report.path", config.report.path)


def _check_cache(config: Config) -> None:
    """It may be another's, to be read only."""
    key = "RSOTRAIN_CACHE_DIR" if config.cache_dir is None else "cache_dir"
    given = config.cache_dir or os.environ.get("RSOTRAIN_CACHE_DIR")
    if given:
        check_path(key, given)
        check_folder(key, given, writable=False)


def _check_names(config: Config) -> None:
    """Those that make up the names of the run's folder and of what is written beside it."""
    if config.run_name is not None:
        check_name("run_name", config.run_name)
    for group in ("model", "optimizer", "sampler"):
        check_name(f"{group}.name", getattr(config, group).name)
    if member := os.environ.get("WANDB_RUN_ID"):
        check_name("WANDB_RUN_ID", member)
    name = run_name(config)
    size = len(name.encode())
    require(
        size <= NAME_BYTES,
        f"the run's folder {name} would have a name of {size} bytes, but {NAME_BYTES} are the most;"
        " give it a run_name",
    )
