"""Random tokens in memory: what a step needs of data, without reading any."""

from dataclasses import dataclass
from typing import cast

import numpy as np

from rsotrain.config import Config, TrainedTokenizerConfig
from rsotrain.data.build import Data
from rsotrain.data.build_tokenizer import read_tokenizer
from rsotrain.data.sequences import PackedSequences
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
    """``NUM_BATCHES`` batches of uniformly random tokens, packed; the same for every rank."""
    size = vocabulary_size(config)
    count = NUM_BATCHES * config.batch_size * config.seq_len + 1
    tokens = np.random.default_rng(config.seed).integers(size, size=count, dtype=np.uint32)
    sequences = PackedSequences(tokens, config.seq_len, num_bytes=count, vocab_size=size)
    return Data(cast(Tokenizer, _Vocabulary(size)), sequences, sequences, fingerprint="random tokens")
