"""Configuration -> everything that training reads: corpus, tokenizer, tokens, sequences."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

from rsotrain.config.data import DataConfig, InstructionsDataConfig, Packing, TokenizerConfig
from rsotrain.data.build_tokenizer import build_tokenizer
from rsotrain.data.cache import Facts, cached_file
from rsotrain.data.documents import Corpus, Notify, Part, batches
from rsotrain.data.progress import documents_with_bar
from rsotrain.data.sequences import PackedSequences, PaddedSequences, TrainingSequences
from rsotrain.data.sources import open_corpora
from rsotrain.data.tokenizer import Tokenizer
from rsotrain.data.tokens import (
    LAYOUT,
    TokenStream,
    check_spans,
    check_tokens,
    open_spans,
    open_tokens,
    write_spans,
    write_tokens,
)
from rsotrain.errors import UserError

ENCODED_CHARACTERS = 4_000_000  # at a time, on all cores; bounds memory

Cached = PackedSequences | PaddedSequences


@dataclass(frozen=True)
class Data:
    """``fingerprint``: of the tokenizer and of the files' bytes; a run must not go on with others."""

    tokenizer: Tokenizer
    train: TrainingSequences
    validation: Cached
    fingerprint: str


def build_data(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    seq_len: int,
    cache_dir: Path,
    notify: Notify,
    batch_size: int | None = None,
    seed: int = 0,
    share: range | None = None,
    max_validation_tokens: int | None = None,
) -> Data:
    """Read, tokenise and cut the documents of a run; what is in the cache is not made again.

    ``notify`` gets a line for each thing that takes time or is amiss. ``batch_size`` (sequences, of all
    ranks), ``seed`` and ``share`` (the places of a batch that this rank asks for; null: all) are needed for
    streaming only. ``max_validation_tokens``: no more than these and the rest of a batch of documents is
    tokenised for validation. Raises UserError for a data file that is missing, empty, malformed or shorter
    than one sequence, for a vocabulary that the text cannot fill, and for a cache that cannot be written.
    """
    train, held_out = open_corpora(data, cache_dir)
    _tell_notes(notify, train, held_out)
    model = build_tokenizer(tokenizer, train, cache_dir, notify, streaming=data.streaming)
    model.use_threads(data.workers)
    sequences: TrainingSequences
    if data.streaming:
        from rsotrain.data.streaming import StreamedSequences

        assert batch_size is not None, "streaming needs to know the batch size"
        sequences = StreamedSequences(
            train, model, data, seq_len=seq_len, batch_size=batch_size, seed=seed, notify=notify, share=share
        )
    else:
        sequences = _cached(train, model, data, seq_len, cache_dir, notify)
    validation = _cached(held_out, model, data, seq_len, cache_dir, notify, max_validation_tokens)
    parts = "".join([model.fingerprint, train.fingerprint, held_out.fingerprint])
    return Data(model, sequences, validation, hashlib.sha256(parts.encode()).hexdigest())


def build_validation(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    cache_dir: Path,
    notify: Notify,
    max_tokens: int | None = None,
) -> Cached:
    """The validation sequences of a configuration with a given tokenizer; raises as ``build_data``."""
    _, held_out = open_corpora(data, cache_dir)
    _tell_notes(notify, held_out)
    return _cached(held_out, tokenizer, data, seq_len, cache_dir, notify, max_tokens)


def _tell_notes(notify: Notify, *corpora: Corpus) -> None:
    for note in dict.fromkeys(corpus.note for corpus in corpora):
        if note is not None:
            notify(f"warning: {note}")


def _cached(
    corpus: Corpus,
    tokenizer: Tokenizer,
    data: DataConfig,
    seq_len: int,
    cache_dir: Path,
    notify: Notify,
    max_tokens: int | None = None,
) -> Cached:
    stream, key = _tokens(corpus, tokenizer, cache_dir, notify, max_tokens)
    keywords = {
        "num_bytes": stream.num_bytes,
        "vocab_size": tokenizer.vocab_size,
        "shuffle": data.shuffle,
        "name": corpus.name,
    }
    if data.packing is Packing.packed:
        return PackedSequences(stream.ids, seq_len, **keywords)
    prompts = isinstance(data, InstructionsDataConfig)

    def prompt_lengths() -> Iterator[int]:
        for texts in batches(corpus.documents(lambda _: None), ENCODED_CHARACTERS):
            yield from (len(ids) for ids in tokenizer.encode([text.prompt for text in texts]))

    def build(file: BinaryIO) -> Facts:
        return write_spans(file, stream, tokenizer.eos_id, prompt_lengths() if prompts else None)

    path, _ = cached_file(
        cache_dir, "spans.npy", key, build, notify, lambda path, _: check_spans(path, stream)
    )
    spans = open_spans(path)
    sequences = PaddedSequences(stream.ids, seq_len, spans=spans, prompts=prompts, **keywords)
    if sequences.num_left_out:
        notify(f"warning: {corpus.name}: {sequences.num_left_out:,} prompts fill seq_len={seq_len}; left out")
    return sequences


def _tokens(
    corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path, notify: Notify, max_tokens: int | None
) -> tuple[TokenStream, Facts]:
    """The stream of a corpus, and what determines it."""

    def build(file: BinaryIO) -> Facts:
        notify(f"tokenising {corpus.described}")
        start = perf_counter()
        with documents_with_bar(corpus, notify) as documents:
            facts = write_tokens(file, batches(documents, ENCODED_CHARACTERS), tokenizer, max_tokens)
        if facts["num_documents"] == 0 and corpus.part is Part.held_out:
            raise UserError(
                f"data.validation_fraction={corpus.fraction} leaves no document of {corpus.name} to validate"
                " on; raise it, or give other documents for validation"
            )
        if facts["num_documents"] == 0:
            raise UserError(f"{corpus.name} has no documents; give another")
        seconds = perf_counter() - start
        notify(
            f"{facts['num_documents']:,} documents are {facts['num_tokens']:,} tokens"
            f" ({seconds:.1f} s, {facts['num_bytes'] / 1e6 / seconds:.1f} MB/s)"
        )
        return facts

    key = {**corpus.key(), "tokenizer": tokenizer.fingerprint, "layout": LAYOUT}
    if max_tokens is not None:
        key["max_tokens"] = max_tokens

    def check(path: Path, facts: Facts) -> None:
        check_tokens(path, facts, tokenizer)

    path, facts = cached_file(cache_dir, "tokens.npy", key, build, notify, check)
    return open_tokens(path, facts), key
