"""Sequences cut from one long stream of tokens, with nothing between them and nothing lost."""

from collections.abc import Iterator

import numpy as np
import torch

from rsotrain.errors import UserError

IGNORE_INDEX = -100  # a target that does not count; the default of torch's cross-entropy


class PackedSequences:
    """The stream ``tokens`` (one-dimensional, unsigned integers; may be memory-mapped) cut every ``seq_len``.

    Sequence i has the inputs tokens[i*L : (i+1)*L] and, as targets, the same window moved one token on.
    So the last target of a sequence is the first input of the next, and no token is a target twice.

    Attributes:
        num_tokens: tokens in the stream; all but the first are targets.
        num_bytes: UTF-8 bytes of the text that the stream encodes.
        vocab_size: every token is less than this.

    Raises UserError, with ``name`` in the sentence, when the stream does not fill one sequence.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, *, num_bytes: int, vocab_size: int, name: str = "the text"
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.num_tokens = len(tokens)
        self.num_bytes = num_bytes
        self.vocab_size = vocab_size
        if len(self) == 0:
            raise UserError(
                f"{name} has {self.num_tokens} tokens, but one sequence of seq_len={seq_len} takes"
                f" {seq_len + 1}; give more text or a smaller seq_len"
            )

    def __len__(self) -> int:
        """Whole training sequences; what is left over at the end is evaluated but not trained on."""
        return (self.num_tokens - 1) // self.seq_len

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token: bits per byte = nats per token / ln 2 / this."""
        return self.num_bytes / (self.num_tokens - 1)

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the given training sequences: both int64, shape (len(indices), seq_len)."""
        assert indices.size > 0
        assert 0 <= indices.min() <= indices.max() < len(self)
        starts = indices.tolist()
        windows = np.stack([self.tokens[i * self.seq_len : (i + 1) * self.seq_len + 1] for i in starts])
        rows = torch.from_numpy(windows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def num_targets(self, max_tokens: int | None = None) -> int:
        """How many tokens ``evaluation_batches`` has predicted."""
        return self.num_tokens - 1 if max_tokens is None else min(self.num_tokens - 1, max_tokens)

    def evaluation_batches(
        self, micro_batch_size: int, max_tokens: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The stream in file order: int64 inputs and targets of shape (<= micro_batch_size, seq_len).

        Each of the first ``max_tokens`` targets (null: each target) comes exactly once, with the same
        context whatever the micro-batch size. The tail of the last sequence is padded: input 0, target
        IGNORE_INDEX.
        """
        assert micro_batch_size > 0
        assert max_tokens is None or max_tokens > 0
        length, num_targets = self.seq_len, self.num_targets(max_tokens)
        for first in range(0, num_targets, micro_batch_size * length):
            last = min(first + micro_batch_size * length, num_targets)
            rows = -(-(last - first) // length)
            inputs = torch.zeros(rows * length, dtype=torch.int64)
            targets = torch.full((rows * length,), IGNORE_INDEX, dtype=torch.int64)
            window = torch.from_numpy(self.tokens[first : last + 1].astype(np.int64))
            inputs[: last - first] = window[:-1]
            targets[: last - first] = window[1:]
            yield inputs.view(rows, length), targets.view(rows, length)
