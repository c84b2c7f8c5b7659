"""What settings of data and tokenizers demand of each other."""

import os
import string
from dataclasses import replace
from pathlib import Path

from rsotrain.config.data import (
    C4DataConfig,
    DataConfig,
    FilesDataConfig,
    HubDataConfig,
    HuggingFaceTokenizerConfig,
    InstructionsDataConfig,
    Packing,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
    TrainedTokenizerConfig,
)
from rsotrain.config.model import ModelConfig
from rsotrain.config.schema import Config, Mode
from rsotrain.errors import UserError, require


def validate_data(config: Config) -> None:
    """Raise UserError for options that contradict each other or have no effect together."""
    data = config.data
    for name in ("lanes", "shuffle_buffer"):
        require(
            data.streaming or getattr(data, name) == getattr(DataConfig, name),
            f"data.{name}={getattr(data, name)} is for data.streaming=true; leave it out",
        )
    require(
        not (data.document_mask and data.packing is Packing.padded),
        "data.document_mask has no effect with data.packing=padded, where a sequence is one document;"
        " leave it out",
    )
    if isinstance(data, FilesDataConfig | InstructionsDataConfig | HubDataConfig):
        _validate_held_out(data, config.mode)
    if isinstance(data, InstructionsDataConfig):
        _validate_instructions(data)
    if isinstance(data, C4DataConfig):
        require(
            (data.path is None) == (data.validation_path is None),
            "data=c4 reads the hub, or files: give both data.path and data.validation_path, or neither",
        )
        require(
            data.path is None or data.revision is None,
            f"data.revision={data.revision} is for the hub and has no effect on files; leave it out",
        )


def evaluated_data(data: DataConfig) -> DataConfig:
    """What mode=evaluate reads: where no part is set aside for validation, all that ``data.path`` names."""
    if isinstance(data, FilesDataConfig | InstructionsDataConfig) and data.validation_path is None:
        return data if data.validation_fraction is not None else replace(data, validation_path=data.path)
    return data


def _validate_held_out(data: FilesDataConfig | InstructionsDataConfig | HubDataConfig, mode: Mode) -> None:
    key = "validation_split" if isinstance(data, HubDataConfig) else "validation_path"
    given, fraction = getattr(data, key), data.validation_fraction
    null = f" (with data.{key}=null)" if isinstance(data, HubDataConfig) else ""
    if mode is Mode.evaluate and not isinstance(data, HubDataConfig) and given is None and fraction is None:
        return  # all of the files; see evaluated_data
    require(
        (given is None) != (fraction is None),
        f"give what to validate on: either data.{key}=… or data.validation_fraction=0.01{null}",
    )


def _validate_instructions(data: InstructionsDataConfig) -> None:
    require(
        data.packing is Packing.padded,
        "data=instructions needs data.packing=padded: in packed sequences prompts would be cut from their"
        " responses",
    )
    require(
        not data.streaming,
        "data=instructions is tokenised into the cache; leave data.streaming out",
    )
    try:
        fields = [field[1:] for field in string.Formatter().parse(data.prompt_template)]
    except ValueError as error:
        raise UserError(f"data.prompt_template is no template ({error}); write fields as {{name}}") from error
    require(
        data.response_field not in {name for name, _, _ in fields},
        f"data.response_field={data.response_field} is a field of data.prompt_template, too; leave it out of"
        " the template, which the response follows by itself",
    )
    require(
        all(
            # "a.b": the field b inside the field a
            name is None or (all(part.isidentifier() for part in name.split(".")) and not form and not kind)
            for name, form, kind in fields
        ),
        "data.prompt_template takes fields by name and as they are, as {instruction}; a brace itself is {{",
    )


def validate_tokenizer(tokenizer: TokenizerConfig, model: ModelConfig) -> None:
    """Raise UserError for a tokenizer that is not there, or does not fit the model's vocabulary."""
    if isinstance(tokenizer, SentencePieceTokenizerConfig | HuggingFaceTokenizerConfig):
        path = Path(tokenizer.path).expanduser()
        is_file = isinstance(tokenizer, SentencePieceTokenizerConfig)
        require(
            os.path.isfile(path) if is_file else os.path.isdir(path),
            f"tokenizer.path={path} is not a {'file' if is_file else 'folder'}",
        )
    if isinstance(tokenizer, TrainedTokenizerConfig):
        require(
            model.init_from is None,
            "tokenizer=trained is trained on this data, and the weights of model.init_from know other pieces;"
            " give theirs with tokenizer=huggingface 'tokenizer.path=${model.init_from}'",
        )
        needed, given = tokenizer.vocab_size, model.vocab_size
        require(
            given is None or given >= needed,
            f"model.vocab_size={given} is smaller than the tokenizer's {needed} pieces; leave it null",
        )
