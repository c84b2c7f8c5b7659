"""From composed YAML to typed dataclasses: the schemas that Hydra checks, and the way out of Hydra."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from rsotrain.cli.hints import unknown_key
from rsotrain.cli.overrides import check_tuned, key_of
from rsotrain.cli.text_keys import keep_text_of_config_files
from rsotrain.config.choices import WeightRounding
from rsotrain.config.defaults import tuned_method
from rsotrain.config.keys import flatten, known_keys, plain
from rsotrain.config.model import FIELDS_OF_THE_RUN, ModelConfig
from rsotrain.config.rules import validate_model
from rsotrain.config.rules_modes import check_read
from rsotrain.config.schema import SCHEMAS, Config, Precision
from rsotrain.config.text import check_path
from rsotrain.config.validation import validate
from rsotrain.errors import UserError

_registered: dict[tuple[str, str], type] = {}  # those that Hydra has: (group, name) -> dataclass


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, under ``schema/`` so that they are no user's option.

    They take the place of those of an earlier command in this process, unless they are the same. From then
    on Hydra reads YAML files with text where a key is text.
    """
    keep_text_of_config_files()
    store = ConfigStore.instance()
    schemas = {(group, name): schema for group, own in SCHEMAS.items() for name, schema in own.items()}
    if "schema" in store.repo and schemas == _registered:
        return
    _registered.clear()
    store.repo.pop("schema", None)
    store.store(group="schema", name="config", node=Config, package="_global_")
    for (group, name), schema in schemas.items():
        store.store(group=f"schema/{group}", name=name, node=schema)
    store.store(group="schema/model", name="pretrained", node=_pretrained_schema())
    OmegaConf.register_new_resolver("rsotrain.pretrained", pretrained_value, replace=True)
    OmegaConf.register_new_resolver("rsotrain.weight_rounding", weight_rounding, replace=True)
    _registered.update(schemas)


def _pretrained_schema() -> DictConfig:
    """A model whose fields are those of the folder ``init_from``, but for what a folder does not tell."""
    schema = OmegaConf.structured(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        if field.name in FIELDS_OF_THE_RUN:
            continue
        if not dataclasses.is_dataclass(field.type):
            schema[field.name] = f"${{rsotrain.pretrained:${{.init_from}},{field.name}}}"
            continue
        for inner in dataclasses.fields(field.type):
            path = f"{field.name}.{inner.name}"
            schema[field.name][inner.name] = f"${{rsotrain.pretrained:${{..init_from}},{path}}}"
    return schema


def weight_rounding(precision: str | Precision) -> str:
    """The default of optimizer.weight_rounding, for conf/config.yaml: stochastic for bfloat16 weights."""
    name = precision.name if isinstance(precision, Precision) else str(precision)
    default = WeightRounding.stochastic if name == Precision.bf16.name else WeightRounding.nearest
    return default.name


def pretrained_value(folder: str | None, path: str) -> Any:
    """One field of the model in a Hugging Face folder, for conf/model/pretrained.yaml."""
    from rsotrain.models.huggingface_config import read_config
    from rsotrain.models.pretrained import ties_embeddings

    if folder is None:
        raise UserError("model.init_from has no value; give a Hugging Face folder with model.init_from=…")
    check_path("model.init_from", folder)
    if path == "tie_word_embeddings":
        return ties_embeddings(Path(folder).expanduser())
    try:
        model = read_config(Path(folder).expanduser())
        validate_model(model)
    except UserError as error:  # of a key that the user has not given
        raise UserError(f"model.init_from={folder}: {error}") from error
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def checked_config(composed: DictConfig, tuned: str | None, arguments: Sequence[str]) -> Config:
    """``to_config``, held against all rules that need neither data nor torch.

    ``tuned``: the chosen option of that group. ``arguments``: the overrides given. Raises UserError.
    """
    config = to_config(composed)
    if tuned and (method := tuned_method(tuned)) is not None:
        check_tuned(tuned, method, config.optimizer.name, arguments)
    check_read(config, map(key_of, arguments))
    validate(config)
    return config


def to_config(composed: DictConfig) -> Config:
    """The composed YAML as typed dataclasses; ``DictConfig`` stops here.

    Raises UserError for a value that is missing or a key that ``+key=`` smuggled past the schema.
    """
    known = set(known_keys())
    for key, _ in flatten(OmegaConf.to_container(composed)):  # type: ignore[arg-type]
        if key not in known:
            raise UserError(unknown_key(key, composed))
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{missing[0]} has no value; give it with {missing[0]}=…")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    values = dict(flatten(plain(config)))
    for key, _ in flatten(OmegaConf.to_container(composed)):  # type: ignore[arg-type]
        if key not in values:  # +key=, of another option: the schema would drop it without a word
            raise UserError(unknown_key(key, OmegaConf.structured(config)))
    for key, value in values.items():  # ~key deletes a key, and the dataclass has nothing for it
        if value == MISSING:
            raise UserError(f"{key} has no value; give it with {key}=…")
    return config
