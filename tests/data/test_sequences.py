"""Packing loses and repeats nothing: against a list-based reference, at every awkward length."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsotrain.config.data import FilesDataConfig, Packing, TrainedTokenizerConfig
from rsotrain.data.build import Data, build_data
from rsotrain.data.sequences import PackedSequences
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.data.unigram import unigram_loss
from rsotrain.errors import UserError

L = 8
VOCAB = 50


def packed(num_tokens: int, seed: int = 0, dtype: type = np.uint16) -> PackedSequences:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(dtype)
    return PackedSequences(tokens, L, num_bytes=4 * num_tokens, vocab_size=VOCAB)


@pytest.mark.parametrize("num_tokens", [L + 1, L + 2, 2 * L, 2 * L + 1, 5 * L + 3])
def test_training_sequences_equal_a_naive_cut(num_tokens: int) -> None:
    sequences = packed(num_tokens)
    tokens = sequences.tokens.tolist()
    naive = []
    while len(tokens) > L:
        naive.append((tokens[:L], tokens[1 : L + 1]))
        tokens = tokens[L:]
    assert len(sequences) == len(naive)
    inputs, targets = sequences.batch(np.arange(len(naive)))
    assert inputs.dtype == targets.dtype == torch.int64
    assert list(zip(inputs.tolist(), targets.tolist(), strict=True)) == naive


def test_a_batch_follows_its_indices() -> None:
    sequences = packed(10 * L)
    inputs, targets = sequences.batch(np.arange(len(sequences)))
    picked = np.array([7, 0, 7, 3])
    for whole, part in zip((inputs, targets), sequences.batch(picked), strict=True):
        assert torch.equal(part, whole[picked])
        assert part.is_contiguous()
    for outside in (-1, len(sequences)):
        with pytest.raises(AssertionError):
            sequences.batch(np.array([outside]))


def test_ids_above_a_signed_16_bit_number_survive() -> None:
    for dtype, largest in ((np.uint16, 65_535), (np.uint32, 128_000)):
        tokens = np.full(L + 1, largest, dtype)
        sequences = PackedSequences(tokens, L, num_bytes=1, vocab_size=largest + 1)
        assert (sequences.batch(np.array([0]))[0] == largest).all()
        assert (next(sequences.evaluation_batches(1))[1] == largest).all()


@pytest.mark.parametrize("num_tokens", [L + 1, L + 2, 3 * L, 3 * L + 1, 11 * L + 5])
@pytest.mark.parametrize("max_tokens", [None, 1, L, L + 1, 3 * L - 1, 10_000])
def test_evaluation_predicts_each_token_but_the_first_once(num_tokens: int, max_tokens: int | None) -> None:
    sequences = packed(num_tokens)
    tokens = sequences.tokens.tolist()
    wanted = tokens[1:] if max_tokens is None else tokens[1 : max_tokens + 1]
    rows_by_size = []
    for size in (1, 2, 3, 100):
        batches = list(sequences.evaluation_batches(size, max_tokens))
        assert all(inputs.shape == targets.shape for inputs, targets in batches)
        assert all(inputs.shape[0] == size for inputs, _ in batches[:-1])
        inputs = torch.cat([inputs for inputs, _ in batches])
        targets = torch.cat([targets for _, targets in batches])
        counted = targets != IGNORE_INDEX
        assert targets[counted].tolist() == wanted
        assert inputs[counted].tolist() == tokens[: len(wanted)]
        assert len(wanted) == sequences.num_targets(max_tokens)
        assert ((inputs >= 0) & (inputs < VOCAB)).all()  # the padding too must have an embedding
        rows_by_size.append((inputs, targets))
    for inputs, targets in rows_by_size[1:]:  # the same context for every target
        assert torch.equal(inputs, rows_by_size[0][0])
        assert torch.equal(targets, rows_by_size[0][1])


@pytest.mark.parametrize("num_tokens", [1, 2, L])
def test_a_text_shorter_than_one_sequence_is_refused(num_tokens: int) -> None:
    with pytest.raises(UserError, match=rf"has {num_tokens} tokens.*seq_len={L}.*smaller seq_len"):
        packed(num_tokens)


@pytest.mark.parametrize("max_tokens", [None, 57])
def test_unigram_loss_equals_the_definition(max_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsotrain.data.sequences.CHUNK_TOKENS", 64)  # several chunks and a rest
    train, validation = packed(500, seed=1), packed(130, seed=2)
    counts = Counter(train.tokens.tolist())
    targets = validation.tokens.tolist()[1:][:max_tokens]
    wanted = -sum(math.log((counts[t] + 1) / (500 + VOCAB)) for t in targets) / len(targets)
    # sums of at most 130 terms in double precision
    assert unigram_loss(train, validation, max_tokens) == pytest.approx(wanted, rel=1e-12)


def test_unigram_loss_of_a_token_that_training_lacks_is_finite() -> None:
    train = PackedSequences(np.zeros(20, np.uint16), L, num_bytes=1, vocab_size=2)
    validation = PackedSequences(np.ones(20, np.uint16), L, num_bytes=1, vocab_size=2)
    assert unigram_loss(train, validation) == pytest.approx(math.log(22))


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_every_sequence_once(
    packing: Packing, shuffle: bool, corpus: tuple[Path, Path], cache_dir: Path
) -> None:
    data = built(corpus, cache_dir, packing=packing, shuffle=shuffle)
    per_epoch = data.train.sequences_per_epoch()
    tokens = len(data.train.tokens) - 1  # type: ignore[union-attr]
    assert per_epoch == (300 if packing is Packing.padded else tokens // 16)
    order = data.train.order(0)
    for epoch in range(3):
        assert sorted(order.indices(epoch * per_epoch, per_epoch).tolist()) == list(range(per_epoch))


def test_the_sequences_of_a_streamed_epoch_are_not_known(corpus: tuple[Path, Path], cache_dir: Path) -> None:
    data = built(corpus, cache_dir, streaming=True)
    assert data.train.sequences_per_epoch() is None


def built(corpus: tuple[Path, Path], cache_dir: Path, **options: Any) -> Data:
    return build_data(
        FilesDataConfig("files", path=str(corpus[0]), validation_path=str(corpus[1]), **options),
        TrainedTokenizerConfig("trained", vocab_size=300),
        seq_len=16,
        cache_dir=cache_dir,
        notify=lambda _: None,
        batch_size=4,
    )
