"""Ranges and cross-field rules of data, tokenizers and modes; part of ``validation.py``."""

import os
import string
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
    SyntheticDataConfig,
    TokenizerConfig,
    TrainedTokenizerConfig,
)
from rsotrain.config.schema import Config, LoadWhat, Mode, ModelConfig
from rsotrain.errors import UserError, require


def positive(config: object, prefix: str, *names: str) -> None:
    """Raise UserError unless these fields of ``config`` are positive, or None."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{prefix}{name}={value} must be positive")


def validate_data(config: Config) -> None:
    """Raise UserError for options that are out of range or have no effect together."""
    data = config.data
    positive(data, "data.", "lanes", "shuffle_buffer", "workers")
    require(data.max_bad_rows >= 0, f"data.max_bad_rows={data.max_bad_rows} must not be negative")
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
        _validate_held_out(data)
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
    if isinstance(data, SyntheticDataConfig):
        positive(
            data, "data.", "num_documents", "num_validation_documents", "words_per_document", "num_words"
        )
        require(data.corpus_seed >= 0, f"data.corpus_seed={data.corpus_seed} must not be negative")


def _validate_held_out(data: FilesDataConfig | InstructionsDataConfig | HubDataConfig) -> None:
    key = "validation_split" if isinstance(data, HubDataConfig) else "validation_path"
    given, fraction = getattr(data, key), data.validation_fraction
    null = f" (with data.{key}=null)" if isinstance(data, HubDataConfig) else ""
    require(
        (given is None) != (fraction is None),
        f"give what to validate on: either data.{key}=… or data.validation_fraction=0.01{null}",
    )
    require(
        fraction is None or 0 < fraction < 1,
        f"data.validation_fraction={fraction} must lie between 0 and 1",
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
            path.is_file() if is_file else path.is_dir(),
            f"tokenizer.path={path} is not a {'file' if is_file else 'folder'}",
        )
    if isinstance(tokenizer, TrainedTokenizerConfig):
        require(
            model.init_from is None,
            "tokenizer=trained is trained on this data, and the weights of model.init_from know other pieces;"
            " give theirs with tokenizer=huggingface 'tokenizer.path=${model.init_from}'",
        )
        require(
            tokenizer.vocab_size >= 300,
            f"tokenizer.vocab_size={tokenizer.vocab_size} is too small; byte fallback alone takes 259 pieces",
        )
        require(
            0.9 <= tokenizer.character_coverage <= 1,
            f"tokenizer.character_coverage={tokenizer.character_coverage} must lie in [0.9, 1]",
        )
        positive(tokenizer, "tokenizer.", "max_training_bytes")
        needed, given = tokenizer.vocab_size, model.vocab_size
        require(
            given is None or given >= needed,
            f"model.vocab_size={given} is smaller than the tokenizer's {needed} pieces; leave it null",
        )


def validate_modes(config: Config) -> None:
    """Raise UserError for what the mode does not read."""
    generate, evaluation = config.generate, config.evaluation
    positive(generate, "generate.", "max_new_tokens", "top_k")
    require(generate.temperature >= 0, f"generate.temperature={generate.temperature} must not be negative")
    require(bool(generate.prompts), "generate.prompts is empty; give at least one, such as ['The ']")
    positive(evaluation, "evaluation.", "task_limit")
    require(
        evaluation.num_fewshot is None or evaluation.num_fewshot >= 0,
        f"evaluation.num_fewshot={evaluation.num_fewshot} must not be negative",
    )
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
        config.mode in (Mode.train, Mode.benchmark) or int(os.environ.get("WORLD_SIZE", "1")) == 1,
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
    positive(config.benchmark, "benchmark.", "warmup_steps", "steps", "profile_steps")
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
        require((folder / "config.json").is_file(), f"model.init_from={folder} holds no config.json")
