"""What a model that knows only how frequent each token is would score: the figure to be far below."""

import numpy as np

from rsotrain.data.sequences import PackedSequences

CHUNK_TOKENS = 1 << 22  # bounds the memory that counting takes


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs: int64, shape (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts


def unigram_loss(train: PackedSequences, validation: PackedSequences, max_tokens: int | None = None) -> float:
    """Nats per token of the validation targets under the training tokens' frequencies.

    One is added to each count, so that no target is impossible. ``max_tokens``: only that many
    targets, the ones that ``evaluation_batches`` has predicted.
    """
    assert train.vocab_size == validation.vocab_size
    train_counts = count_tokens(train.tokens, train.vocab_size) + 1
    log_probabilities = np.log(train_counts / train_counts.sum())
    num_targets = validation.num_targets(max_tokens)
    target_counts = count_tokens(validation.tokens[1 : num_targets + 1], validation.vocab_size)
    return float(-(target_counts @ log_probabilities) / num_targets)
