"""The order of sequences is a permutation per epoch and depends on nothing but seed and position."""

import numpy as np
import pytest

from rsotrain.data.order import SequenceOrder


def stream(order: SequenceOrder, batch_size: int, total: int) -> list[int]:
    """The first ``total`` indices that batches of one size give."""
    batches = [order.indices(first, batch_size) for first in range(0, total, batch_size)]
    return np.concatenate(batches)[:total].tolist()


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5, 16, 17, 255, 256, 1000])
def test_every_epoch_is_a_permutation(num_sequences: int) -> None:
    order = SequenceOrder(num_sequences, seed=3)
    for epoch in range(4):
        indices = order.indices(epoch * num_sequences, num_sequences)
        assert indices.dtype == np.int64
        assert indices.shape == (num_sequences,)
        assert sorted(indices.tolist()) == list(range(num_sequences))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 37, 100, 256])
def test_batches_of_any_size_give_the_same_stream(batch_size: int) -> None:
    # 37 sequences: the larger batches hold several epochs, the smaller ones straddle their ends
    reference = SequenceOrder(37, seed=5).indices(0, 37 * 7).tolist()
    assert stream(SequenceOrder(37, seed=5), batch_size, 37 * 7) == reference
    for epoch in range(7):
        assert sorted(reference[epoch * 37 : (epoch + 1) * 37]) == list(range(37))


def test_a_step_needs_no_earlier_step() -> None:
    order = SequenceOrder(1000, seed=0)
    forwards = [order.indices(step * 48, 48).tolist() for step in range(60)]
    for step in (59, 0, 20, 21):
        assert order.indices(step * 48, 48).tolist() == forwards[step]
        assert SequenceOrder(1000, seed=0).indices(step * 48, 48).tolist() == forwards[step]


def test_epochs_and_seeds_differ_and_none_is_the_file_order() -> None:
    n = 5000
    orders = [
        SequenceOrder(n, seed).indices(epoch * n, n) for seed in (0, 1, 2**63, 2**64 - 1) for epoch in (0, 1)
    ]
    # Correlations of independent permutations have standard deviation 1/sqrt(n - 1) = 0.014: five of them.
    limit = 5 / (n - 1) ** 0.5
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(one, np.arange(n))[0, 1]) < limit
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < limit
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < limit


def test_a_sequence_stands_at_every_place_about_as_often() -> None:
    n, num_epochs = 10, 20_000
    order = SequenceOrder(n, seed=11)
    places = np.argsort(order.indices(0, n * num_epochs).reshape(num_epochs, n), axis=1)
    for sequence in range(n):
        counts = np.bincount(places[:, sequence], minlength=n)
        # binomial: mean 2000, standard deviation 42; five of them
        assert abs(counts - num_epochs / n).max() < 5 * (num_epochs * 0.1 * 0.9) ** 0.5


def test_large_data_and_late_steps() -> None:
    order = SequenceOrder(10**12, seed=1)
    indices = order.indices(512 * 10**9, 512)
    assert len(set(indices.tolist())) == 512
    assert indices.min() >= 0
    assert indices.max() < 10**12
    assert indices.max() > 10**11  # 512 draws below a tenth of the range: never


def test_the_order_is_the_one_that_old_runs_have() -> None:
    """A resumed run must go on in its own order: a change here is a change of the checkpoints' format."""
    assert SequenceOrder(1000, seed=0).indices(0, 6).tolist() == [915, 65, 267, 843, 145, 408]
    assert SequenceOrder(1000, seed=42).indices(1234 * 6, 6).tolist() == [276, 598, 403, 677, 816, 411]
