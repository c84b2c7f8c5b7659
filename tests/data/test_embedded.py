"""The corpus that ships with the package."""

from pathlib import Path

import pytest

from rsotrain.config.data import EmbeddedDataConfig, TrainedTokenizerConfig
from rsotrain.data.build import build_data
from rsotrain.data.sequences import PackedSequences


@pytest.mark.slow
def test_the_embedded_corpus(cache_dir: Path) -> None:
    data = build_data(
        EmbeddedDataConfig("embedded"),
        TrainedTokenizerConfig("trained"),
        seq_len=256,
        cache_dir=cache_dir,
        notify=lambda _: None,
    )
    assert data.tokenizer.vocab_size == 4096
    assert data.train.num_bytes == 16_852_392
    assert data.validation.num_bytes == 766_924
    for sequences in (data.train, data.validation):
        assert 3.5 < sequences.num_bytes / sequences.num_tokens < 4.5
    first = data.validation.tokens[1:40].tolist()
    assert data.tokenizer.decode(first).startswith("CHAPTER XI\n\nMr. Elton must now be left to himself.")
    assert not shares_a_sequence(data.train, data.validation)


def shares_a_sequence(train: PackedSequences, validation: PackedSequences) -> bool:
    """Whether any 64 tokens at the start of a validation sequence stand in training too."""
    haystack = train.tokens.tobytes()
    return any(validation.tokens[i : i + 64].tobytes() in haystack for i in range(0, 50_000, 5_000))
