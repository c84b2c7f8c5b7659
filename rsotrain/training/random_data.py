"""Random tokens in memory: what a step needs of data, without reading any."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rsotrain.config.data import Packing, TrainedTokenizerConfig
from rsotrain.config.schema import Config
from rsotrain.data.build import Data
from rsotrain.data.build_tokenizer import read_tokenizer
from rsotrain.data.sequences import PackedSequences, PaddedSequences
from rsotrain.data.tokenizer import Tokenizer

NUM_BATCHES = 8


@dataclass(frozen=True)
class _Vocabulary:
    """All that a Trainer asks a tokenizer for before it evaluates or generates."""

    vocab_size: int
    eos_id: int = 0


def vocabulary_size(config: Config) -> int:
    """Of the tokenizer that the run would have; the model's where that is configured.

    Raises UserError where the tokenizer has to be opened for that and cannot be.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if isinstance(config.tokenizer, TrainedTokenizerConfig):
        return config.tokenizer.vocab_size
    return read_tokenizer(config.tokenizer).vocab_size


def random_data(config: Config) -> Data:
    """``NUM_BATCHES`` batches of uniformly random tokens, packed or padded; the same for every rank.

    A padded sequence is a document of between half of ``seq_len`` and all of it.
    """
    size = vocabulary_size(config)
    random = np.random.default_rng(config.seed)
    number = NUM_BATCHES * config.batch_size
    shared: dict[str, Any] = {"seq_len": config.seq_len, "vocab_size": size}
    if config.data.packing is Packing.padded:
        lengths = random.integers(config.seq_len // 2, config.seq_len, size=number, endpoint=True)
        ends = np.cumsum(lengths + 1)  # each after the separator before it, ends[i] is that of the next
        tokens = random.integers(size, size=ends[-1] + 1, dtype=np.uint32)
        spans = np.stack([ends - lengths, ends - lengths, ends], axis=1)
        sequences: PackedSequences | PaddedSequences = PaddedSequences(
            tokens, spans=spans, num_bytes=len(tokens), **shared
        )
    else:
        tokens = random.integers(size, size=number * config.seq_len + 1, dtype=np.uint32)
        sequences = PackedSequences(tokens, num_bytes=len(tokens), **shared)
    return Data(cast(Tokenizer, _Vocabulary(size)), sequences, sequences, fingerprint="random tokens")
