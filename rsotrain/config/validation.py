"""Everything that can be refused before any work is done: ranges, rules between settings, names, folders."""

import os
from pathlib import Path

from rsotrain.config.ranges import check_ranges
from rsotrain.config.rules import (
    validate_checkpoint,
    validate_lr_scheduler,
    validate_model,
    validate_parallelism,
)
from rsotrain.config.rules_data import validate_data, validate_tokenizer
from rsotrain.config.rules_modes import validate_modes
from rsotrain.config.schema import Config, Mode
from rsotrain.errors import require


def validate(config: Config) -> None:
    """Raise UserError with one sentence for the first rule that ``config`` breaks.

    Ranks too large, and which samplers an optimizer takes, are for ``optim/build.py`` to refuse.
    """
    check_ranges(config)
    validate_parallelism(config, int(os.environ.get("WORLD_SIZE", "1")))
    validate_model(config.model)
    longest = config.model.max_position_embeddings
    require(
        config.seq_len <= longest
        or config.mode in (Mode.evaluate, Mode.generate, Mode.export),  # another model
        f"seq_len={config.seq_len} is longer than model.max_position_embeddings={longest};"
        " shorten the sequences or raise the model's maximum",
    )
    validate_lr_scheduler(config.lr_scheduler, config.steps)
    validate_data(config)
    validate_tokenizer(config.tokenizer, config.model)
    validate_modes(config)
    validate_checkpoint(config)
    name = config.run_name
    require(
        name is None or (name not in ("", ".", "..") and Path(name).name == name),
        f"run_name={name} must be the name of one folder, without a slash",
    )
    _validate_folder("output_dir", config.output_dir)
    require(
        config.report.path is not None or not config.report.claims,
        "report.claims=true is a part of the report; give the folder for it with report.path=…",
    )
    if config.report.path is not None:
        _validate_folder("report.path", config.report.path)


def _validate_folder(key: str, path: str) -> None:
    existing = folder = Path(path).expanduser()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    require(existing.is_dir(), f"{key}={folder}: {existing} is not a folder")
    require(os.access(existing, os.W_OK | os.X_OK), f"{key}={folder}: {existing} is not writable")
