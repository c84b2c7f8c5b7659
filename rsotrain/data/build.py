"""Configuration -> everything that training reads: the one place where data configurations meet code."""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, BinaryIO

from rsotrain.config import (
    DataConfig,
    EmbeddedDataConfig,
    FilesDataConfig,
    TokenizerConfig,
    TrainedTokenizerConfig,
)
from rsotrain.data.cache import Facts, cached_file, temporary_folder
from rsotrain.data.documents import Source, batches, load_documents, shuffled_texts
from rsotrain.data.sequences import PackedSequences
from rsotrain.data.tokenizer import Tokenizer, train_tokenizer
from rsotrain.data.tokens import LAYOUT, TokenStream, open_tokens, write_tokens

if TYPE_CHECKING:
    from datasets import Dataset

CORPUS = Path(__file__).parent / "corpus"

Notify = Callable[[str], None]
Load = Callable[[Source], "Dataset"]


@dataclass(frozen=True)
class Data:
    """``fingerprint``: of the tokenizer and of the files' bytes; a run must not go on with others."""

    tokenizer: Tokenizer
    train: PackedSequences
    validation: PackedSequences
    fingerprint: str


def build_data(
    data: DataConfig, tokenizer: TokenizerConfig, *, seq_len: int, cache_dir: Path, notify: Notify
) -> Data:
    """Read, tokenise and pack the documents of a run; what is in the cache is not made again.

    ``notify`` gets a line for each thing that takes time or is amiss. Raises UserError for a data file
    that is missing, empty, malformed or shorter than one sequence, for a vocabulary that the text cannot
    fill, and for a cache that cannot be written.
    """
    train, validation = _sources(data)
    with ExitStack() as folders:

        @cache
        def load(source: Source) -> "Dataset":
            return load_documents(source, folders.enter_context(temporary_folder(cache_dir)))

        model = _build_tokenizer(tokenizer, train, load, cache_dir, notify)
        train_tokens = _build_tokens(train, model, load, cache_dir, notify)
        validation_tokens = _build_tokens(validation, model, load, cache_dir, notify)

    def pack(tokens: TokenStream, source: Source) -> PackedSequences:
        return PackedSequences(
            tokens.ids,
            seq_len,
            num_bytes=tokens.num_bytes,
            vocab_size=model.vocab_size,
            name=f"the data file {source.path}",
        )

    parts = "".join([model.fingerprint, train.fingerprint, validation.fingerprint])
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()
    return Data(model, pack(train_tokens, train), pack(validation_tokens, validation), fingerprint)


def _sources(data: DataConfig) -> tuple[Source, Source]:
    """What to train on and what to validate on."""
    match data:
        case EmbeddedDataConfig():
            return Source(CORPUS / "train.json.gz"), Source(CORPUS / "validation.json.gz")
        case FilesDataConfig():
            return (
                Source(Path(data.path).expanduser(), data.text_field),
                Source(Path(data.validation_path).expanduser(), data.text_field),
            )
    raise TypeError(f"no reader for {type(data).__name__}")


def _build_tokenizer(
    config: TokenizerConfig, train: Source, load: Load, cache_dir: Path, notify: Notify
) -> Tokenizer:
    match config:
        case TrainedTokenizerConfig():

            def build(file: BinaryIO) -> Facts:
                notify(f"training a tokenizer of {config.vocab_size:,} pieces on {train.path}")
                file.write(train_tokenizer(shuffled_texts(load(train)), config))
                return {}

            settings = {
                "source": train.fingerprint,
                "text_field": train.text_field,
                "vocab_size": config.vocab_size,
                "character_coverage": config.character_coverage,
                "max_training_bytes": config.max_training_bytes,
            }
            path, _ = cached_file(cache_dir, "tokenizers.model", settings, build, notify)
            return Tokenizer(path.read_bytes())
    raise TypeError(f"no builder for {type(config).__name__}")


def _build_tokens(
    source: Source, tokenizer: Tokenizer, load: Load, cache_dir: Path, notify: Notify
) -> TokenStream:
    def build(file: BinaryIO) -> Facts:
        notify(f"tokenising {source.path}")
        start = perf_counter()
        facts = write_tokens(file, batches(load(source)), tokenizer)
        notify(
            f"{facts['num_documents']:,} documents are {facts['num_tokens']:,} tokens"
            f" ({perf_counter() - start:.1f} s)"
        )
        return facts

    settings = {
        "source": source.fingerprint,
        "text_field": source.text_field,
        "tokenizer": tokenizer.fingerprint,
        "layout": LAYOUT,
    }
    path, facts = cached_file(cache_dir, "tokens.npy", settings, build, notify)
    return open_tokens(path, facts)
