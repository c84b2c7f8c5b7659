"""The order of sequences: a pure function of (seed, position) with no state to save.

The position is the number of sequences that training has taken, so that a run goes on with the next one
whatever its batches were and will be.

Each epoch is a permutation of [0, n) that is computed element by element, so that neither a table of
n entries nor a replay of earlier steps is needed: a Feistel network permutes the numbers of as many bits
as n - 1 has, and a result outside [0, n) is sent through again until it falls inside ("cycle walking";
Black & Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002). Fewer than 2n numbers have that many
bits, so that takes fewer than 2 passes on average.
"""

import numpy as np

NUM_ROUNDS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014): a bijection of uint64 that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class FileOrder:
    """The sequences as they come, again from the first after the last; without end where that is null.

    Then the index of a sequence is its position in a stream.
    """

    def __init__(self, num_sequences: int | None) -> None:
        self.num_sequences = num_sequences

    def indices(self, position: int, count: int) -> np.ndarray:
        """The ``count`` sequences from ``position`` on: int64, shape (count,)."""
        places = np.arange(position, position + count, dtype=np.int64)
        return places if self.num_sequences is None else places % self.num_sequences


class SequenceOrder:
    """Every sequence exactly once per epoch, in an order that differs by seed and by epoch.

    The batches, laid end to end, are the epochs laid end to end, whatever size each batch has; the last
    batch of an epoch is filled up from the next one.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        assert num_sequences > 0
        self.num_sequences = num_sequences
        num_bits = max(2, (num_sequences - 1).bit_length())
        self._low_bits = np.uint64(num_bits // 2)
        self._low_mask = np.uint64(2 ** (num_bits // 2) - 1)
        self._high_mask = np.uint64(2 ** (num_bits - num_bits // 2) - 1)
        golden_ratio = np.uint64(0x9E3779B97F4A7C15)  # keeps seed 0 off the fixed point of _mix
        self._seed_key = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64) + golden_ratio)

    def indices(self, position: int, count: int) -> np.ndarray:
        """The ``count`` sequences from ``position`` on: int64, shape (count,).

        Time and memory are proportional to ``count``.
        """
        assert position >= 0
        assert count > 0
        positions = np.uint64(position) + np.arange(count, dtype=np.uint64)
        n = np.uint64(self.num_sequences)
        epoch_keys = _mix(self._seed_key ^ _mix(positions // n + np.uint64(1)))
        keys = _mix(epoch_keys + np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None])
        result = self._permute(positions % n, keys)
        while (outside := np.flatnonzero(result >= n)).size:
            result[outside] = self._permute(result[outside], keys[:, outside])
        return result.astype(np.int64)

    def _permute(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A bijection of the whole domain; ``x``: shape (b,), ``keys``: shape (NUM_ROUNDS, b)."""
        high, low = x >> self._low_bits, x & self._low_mask
        for high_key, low_key in zip(keys[::2], keys[1::2], strict=True):
            high = high ^ (_mix(high_key + low) & self._high_mask)
            low = low ^ (_mix(low_key + high) & self._low_mask)
        return (high << self._low_bits) | low
