"""Sequences cut from the cached stream of tokens, packed or one document each.

Both kinds have the same methods: ``batch`` serves any sequences by their index, ``order`` says in which
order to train on them, ``evaluation_batches`` gives each target once, in file order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from rsotrain.config.data import Packing
from rsotrain.data.order import FileOrder, SequenceOrder
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]
Decode = Callable[[Sequence[int]], str]


class TrainingSequences(Protocol):
    """What a trainer reads; sequences are numbered, and any of them can be asked for at any time.

    A rank of several asks for its share of ``order(seed).indices(position, batch_size)``, where the
    position is the number of sequences that all ranks have taken.
    """

    seq_len: int

    def order(self, seed: int) -> "FileOrder | SequenceOrder": ...

    def batch(self, indices: np.ndarray) -> Batch:
        """Inputs and targets, both int64, shape (len(indices), seq_len); IGNORE_INDEX is no target."""

    def sequences_per_epoch(self) -> int | None:
        """How many sequences an epoch has; None where that is known only after reading it."""

    def order_settings(self) -> dict[str, int | bool | str]:
        """What the order depends on, beside the documents, the tokenizer, ``seq_len`` and the seed."""

    def position_after(self, sequences: int, seq_len: int) -> int:
        """Where to go on after ``sequences`` of ``seq_len`` tokens have been taken.

        With another ``seq_len`` than now that is the first sequence which has not been seen whole.
        """

    def state_dict(self, position: int) -> dict[str, Any]:
        """What going on from ``position`` takes beside it, as JSON can hold it; nothing for cached tokens.

        Of several ranks each has a part, which ``merged_states`` puts together.
        """

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Go on from ``position``, of which ``state`` is."""

    def close(self) -> None: ...


class EvaluationSequences(Protocol):
    """What an evaluation reads."""

    vocab_size: int

    def num_targets(self, max_tokens: int | None = None) -> int: ...

    def num_target_bytes(self, decode: Decode, max_tokens: int | None = None) -> int: ...

    def target_counts(self, max_tokens: int | None = None) -> np.ndarray: ...

    def evaluation_batches(self, micro_batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]: ...


def merged_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of a run from the ``state_dict`` of each rank: the lanes of all."""
    if not states[0]:
        return {}
    return {**states[0], "lanes": {n: m for state in states for n, m in state["lanes"].items()}}


class CachedSequences(ABC):
    """What both kinds share: the stream, the order, and no state.

    Attributes:
        packing: which of the kinds.
        tokens: one-dimensional, unsigned integers; may be memory-mapped.
        num_bytes: UTF-8 bytes of the text that the stream encodes.
        vocab_size: every token is less than this.
    """

    packing: Packing

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        *,
        num_bytes: int,
        vocab_size: int,
        shuffle: bool = True,
        name: str = "the text",
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.num_tokens = len(tokens)
        self.num_bytes = num_bytes
        self.vocab_size = vocab_size
        self.shuffle = shuffle
        self.name = name

    def __len__(self) -> int:
        """Sequences to train on, those of an epoch."""
        return self.num_sequences(self.seq_len)

    def sequences_per_epoch(self) -> int:
        return len(self)

    @abstractmethod
    def num_sequences(self, seq_len: int) -> int:
        """As many as there would be with sequences of ``seq_len``."""

    @abstractmethod
    def _sequences_in(self, sequences: int, seq_len: int) -> int:
        """The sequences that lie wholly in the first ``sequences`` of ``seq_len``."""

    def order(self, seed: int) -> FileOrder | SequenceOrder:
        return SequenceOrder(len(self), seed) if self.shuffle else FileOrder(len(self))

    def order_settings(self) -> dict[str, int | bool | str]:
        return {"packing": self.packing.name, "shuffle": self.shuffle, "streaming": False}

    def position_after(self, sequences: int, seq_len: int) -> int:
        """As many epochs, and in the last one as many tokens or documents."""
        epochs, rest = divmod(sequences, max(1, self.num_sequences(seq_len)))
        return epochs * len(self) + self._sequences_in(rest, seq_len)

    def state_dict(self, position: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:  # noqa: B027
        """Nothing is taken up, of a streamed run neither: the order depends on the position alone."""

    def close(self) -> None:  # noqa: B027, what others have to do
        """Nothing is held open but the mapped file."""


class PackedSequences(CachedSequences):
    """The stream cut every ``seq_len`` tokens, with nothing between the sequences and nothing lost.

    Sequence i has the inputs tokens[i*L : (i+1)*L] and, as targets, the same window moved one token on.
    So the last target of a sequence is the first input of the next, and no token is a target twice.

    Raises UserError, with ``name`` in the sentence, when the stream does not fill one sequence.
    """

    packing = Packing.packed

    def __init__(self, tokens: np.ndarray, seq_len: int, **keywords: Any) -> None:
        super().__init__(tokens, seq_len, **keywords)
        if len(self) == 0:
            raise UserError(
                f"{self.name} has {self.num_tokens} tokens, but one sequence of seq_len={seq_len} takes"
                f" {seq_len + 1}; give more text or a smaller seq_len"
            )

    def num_sequences(self, seq_len: int) -> int:
        """Whole ones; what is left over at the end is evaluated but not trained on."""
        return (self.num_tokens - 1) // seq_len

    def _sequences_in(self, sequences: int, seq_len: int) -> int:
        return min(sequences * seq_len // self.seq_len, len(self))

    def batch(self, indices: np.ndarray) -> Batch:
        assert indices.size > 0
        assert 0 <= indices.min() <= indices.max() < len(self)
        starts = indices.tolist()
        windows = np.stack([self.tokens[i * self.seq_len : (i + 1) * self.seq_len + 1] for i in starts])
        rows = torch.from_numpy(windows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def num_targets(self, max_tokens: int | None = None) -> int:
        """How many tokens ``evaluation_batches`` predicts: all but the first, or ``max_tokens``."""
        return self.num_tokens - 1 if max_tokens is None else min(self.num_tokens - 1, max_tokens)

    def num_target_bytes(self, decode: Decode, max_tokens: int | None = None) -> int:
        """UTF-8 bytes of the text that these targets encode."""
        scored = self.num_targets(max_tokens)
        if scored == self.num_tokens - 1:
            return self.num_bytes
        return len(decode(self.tokens[: scored + 1].tolist()).encode())

    def target_counts(self, max_tokens: int | None = None) -> np.ndarray:
        """How often each token is one of these targets: int64, shape (vocab_size,)."""
        return count_tokens(self.tokens[1 : self.num_targets(max_tokens) + 1], self.vocab_size)

    def evaluation_batches(self, micro_batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
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


class PaddedSequences(CachedSequences):
    """A document a sequence: the separator, then the document, cut at ``seq_len`` or padded up to it.

    The papers' protocol (arXiv 2403.03507), but that the first token of a document is predicted too, from
    the separator before it. The separator after a document that fits is a target; padding and prompts
    are not. ``spans``: of ``write_spans``, int64 (num_documents, 3). Documents whose prompt leaves no room
    for a target are left out.

    Raises UserError, with ``name`` in the sentence, when no document is left.
    """

    packing = Packing.padded

    def __init__(
        self, tokens: np.ndarray, seq_len: int, *, spans: np.ndarray, prompts: bool = False, **keywords: Any
    ) -> None:
        super().__init__(tokens, seq_len, **keywords)
        self.prompt_lengths = spans[:, 1] - spans[:, 0] if prompts else None
        self.spans = spans if self.prompt_lengths is None else spans[self.prompt_lengths < seq_len]
        self.num_left_out = len(spans) - len(self.spans)
        if len(self) == 0:
            raise UserError(
                f"{self.name} has no document whose prompt leaves room in seq_len={seq_len}; raise it"
            )

    def num_sequences(self, seq_len: int) -> int:
        if self.prompt_lengths is None:
            return len(self.spans)
        return int((self.prompt_lengths < seq_len).sum())

    def _sequences_in(self, sequences: int, seq_len: int) -> int:
        return min(sequences, len(self))

    def batch(self, indices: np.ndarray) -> Batch:
        assert indices.size > 0
        assert 0 <= indices.min() <= indices.max() < len(self)
        inputs = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        for row, (start, scored, end) in enumerate(self.spans[indices].tolist()):
            last = min(end, start + self.seq_len - 1)  # the last target
            window = torch.from_numpy(self.tokens[start - 1 : last + 1].astype(np.int64))
            inputs[row, : last - start + 1] = window[:-1]
            targets[row, scored - start : last - start + 1] = window[scored - start + 1 :]
        return inputs, targets

    def _lengths(self) -> np.ndarray:
        """Targets of each document."""
        start, scored, end = self.spans.T
        return np.minimum(end, start + self.seq_len - 1) - scored + 1

    def num_targets(self, max_tokens: int | None = None) -> int:
        total = int(self._lengths().sum())
        return total if max_tokens is None else min(total, max_tokens)

    def num_target_bytes(self, decode: Decode, max_tokens: int | None = None) -> int:
        """UTF-8 bytes of the text that these targets encode; a cut character counts as its replacement."""
        left = self.num_targets(max_tokens)
        num_bytes = 0
        for (_, scored, _), length in zip(self.spans.tolist(), self._lengths().tolist(), strict=True):
            if left <= 0:
                break
            num_bytes += len(decode(self.tokens[scored : scored + min(length, left)].tolist()).encode())
            left -= length
        return num_bytes

    def target_counts(self, max_tokens: int | None = None) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int64)
        for _, targets in self.evaluation_batches(256, max_tokens):
            counts += np.bincount(targets[targets != IGNORE_INDEX].numpy(), minlength=self.vocab_size)
        return counts

    def evaluation_batches(self, micro_batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """The documents in file order until ``max_tokens`` targets are reached, the last one cut there."""
        assert micro_batch_size > 0
        assert max_tokens is None or max_tokens > 0
        left = self.num_targets(max_tokens)
        for first in range(0, len(self), micro_batch_size):
            inputs, targets = self.batch(np.arange(first, min(first + micro_batch_size, len(self))))
            counted = (targets != IGNORE_INDEX).flatten().cumsum(0).view_as(targets)
            targets.masked_fill_(counted > left, IGNORE_INDEX)
            left -= int((targets != IGNORE_INDEX).sum())
            yield inputs, targets
            if left <= 0:
                return


CHUNK_TOKENS = 1 << 22  # bounds the memory that counting takes


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs: int64, shape (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    return counts
