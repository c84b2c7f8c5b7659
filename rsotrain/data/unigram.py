"""What a model that knows only how frequent each token is would score: the figure to be far below."""

import numpy as np

from rsotrain.data.sequences import CachedSequences, EvaluationSequences, TrainingSequences, count_tokens


def unigram_loss(
    train: TrainingSequences, validation: EvaluationSequences, max_tokens: int | None = None
) -> float | None:
    """Nats per token of the validation targets under the training tokens' frequencies.

    One is added to each count, so that no target is impossible. ``max_tokens``: only that many
    targets, the ones that ``evaluation_batches`` has predicted. None where the training tokens are
    streamed, and so never counted.
    """
    if not isinstance(train, CachedSequences):
        return None
    assert train.vocab_size == validation.vocab_size
    train_counts = count_tokens(train.tokens, train.vocab_size) + 1
    log_probabilities = np.log(train_counts / train_counts.sum())
    counts = validation.target_counts(max_tokens)
    return float(-(counts @ log_probabilities) / counts.sum())
