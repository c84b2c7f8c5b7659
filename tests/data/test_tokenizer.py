"""The tokenizer loses nothing, is the same every time, and refuses what it cannot do."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rsotrain.config.data import ModelType, TrainedTokenizerConfig
from rsotrain.config.ranges import check_ranges
from rsotrain.data.tokenizer import PIECE_CHARACTERS, SentencePieceTokenizer, _pieces, train_tokenizer
from rsotrain.data.tokenizer_process import train_tokenizer_apart
from rsotrain.errors import TrainingError, UserError

SENTENCES = [
    "The whale swam under the ship, and the captain saw it.\n",
    "Call me Ishmael. Some years ago - never mind how long - I went to sea.\n\n",
    "In 1851 it cost 3 shillings;\tnow it costs 1234567 pounds.",
    "Gentlemen of the Senate and House of Representatives: the state of the union is strong.",
]
CONFIG = TrainedTokenizerConfig(vocab_size=340)


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(SENTENCES * 5, CONFIG))


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "",
        " ",
        "   two  spaces   around   ",
        "\n\n\t tabs\tand\r\nline breaks\x0b\x0c\n",
        "é e\u0301 ﬁ ＡＢＣ ① İ ß",  # nothing is composed, folded or compatibility-mapped
        "日本語 🙂 👩\u200d👩\u200d👧 \U0010ffff",
        "\ufeffbyte order mark, \u2028line\x85separators\u2029, no\xa0break, zero\u200bwidth",
        "a\x00b\x1b\x7f\ufffd",
        "<s></s><unk><0x0A><pad>",  # the names of control pieces are text like any other
        "▁", "▁▁a ▁b▁ ", " ▁",  # the character that SentencePiece uses for a space
        "⁇ \u2047",  # what it writes for an unknown piece
    ],
)  # fmt: skip
def test_decode_undoes_encode(tokenizer: SentencePieceTokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


def test_decode_undoes_encode_of_random_text(tokenizer: SentencePieceTokenizer) -> None:
    rng = random.Random(0)
    alphabet = "ab the\n\t ▁é日🙂\x00<>0"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(300)]
    ids = tokenizer.encode(texts)
    assert [tokenizer.decode(i) for i in ids] == texts
    assert all(np.array_equal(tokenizer.encode([text])[0], i) for text, i in zip(texts, ids, strict=True))


def test_bos_and_eos_are_not_text(tokenizer: SentencePieceTokenizer) -> None:
    (ids,) = tokenizer.encode(["the ship"])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, CONFIG.vocab_size)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "the ship"


def test_training_is_deterministic_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    models = [train_tokenizer(SENTENCES * 5, CONFIG) for _ in range(2)]
    assert models[0] == models[1]
    assert SentencePieceTokenizer(models[0]).fingerprint == SentencePieceTokenizer(models[1]).fingerprint
    other = train_tokenizer(SENTENCES * 5, TrainedTokenizerConfig(vocab_size=320))
    assert SentencePieceTokenizer(other).fingerprint != SentencePieceTokenizer(models[0]).fingerprint
    assert capfd.readouterr() == ("", "")


def test_it_learns_words_and_splits_digits(tokenizer: SentencePieceTokenizer) -> None:
    assert len(tokenizer.encode([" the"])[0]) == 1
    assert len(tokenizer.encode(["1851"])[0]) == 4


def test_a_long_line_is_used_and_not_dropped() -> None:
    word = "zyzzyva"
    line = f"{word} " * PIECE_CHARACTERS  # eight times the longest piece
    model = SentencePieceTokenizer(train_tokenizer([line], TrainedTokenizerConfig(vocab_size=270)))
    assert len(model.encode([f" {word}"])[0]) == 1


def test_training_reads_no_more_than_asked() -> None:
    read = []

    def texts() -> Iterator[str]:
        for i in range(1000):
            read.append(i)
            yield "é" * 50  # 100 bytes

    assert sum(len(piece.encode()) for piece in _pieces(texts(), max_bytes=1050)) == 1000
    assert len(read) == 11


def test_too_many_pieces_for_the_text_are_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=4096 is more than .* \(at most \d+\)"):
        train_tokenizer(SENTENCES, TrainedTokenizerConfig(vocab_size=4096))


def test_too_few_pieces_for_the_characters_are_refused() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(UserError, match=r"vocab_size=300 is too small .*character_coverage"):
        train_tokenizer([text], TrainedTokenizerConfig(vocab_size=300, character_coverage=1.0))


@pytest.mark.parametrize("model_type", list(ModelType))
@pytest.mark.parametrize("text", ["a", "ab", "aaaa bbbb", "é", "1", " ", "a</s>b", "abc abc abd abe", "名"])
def test_the_number_that_a_refusal_names_is_taken(text: str, model_type: ModelType) -> None:
    """Few characters fill few pieces: fewer than 300."""
    with pytest.raises(UserError, match=r"\(at most \d+\)") as refused:
        train_tokenizer([text], TrainedTokenizerConfig(vocab_size=4096, model_type=model_type))
    largest = int(re.findall(r"at most (\d+)", str(refused.value))[0])
    config = TrainedTokenizerConfig("trained", vocab_size=largest, model_type=model_type)
    check_ranges(config)
    tokenizer = SentencePieceTokenizer(train_tokenizer([text], config))
    assert tokenizer.vocab_size == largest
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_too_few_pieces_for_the_characters_name_the_number_needed() -> None:
    with pytest.raises(UserError, match=r"the characters of the training text, which take 265 pieces"):
        train_tokenizer(["abcdef"], TrainedTokenizerConfig(vocab_size=260))
    train_tokenizer(["abcdef"], TrainedTokenizerConfig(vocab_size=265))


@pytest.mark.parametrize("model_type", list(ModelType))
@pytest.mark.parametrize("text", ["\0", "</s>", "<s>", "<unk>", "<0x41>"])
def test_text_without_a_character_to_learn_is_refused(text: str, model_type: ModelType) -> None:
    for vocab_size in (260, 300):
        with pytest.raises(UserError, match="no characters that a tokenizer could learn; give other"):
            train_tokenizer([text], TrainedTokenizerConfig(vocab_size=vocab_size, model_type=model_type))


def test_the_range_of_character_coverage_is_sentencepieces_own() -> None:
    for coverage in (0.98, 1.0):
        check_ranges(config := TrainedTokenizerConfig(vocab_size=340, character_coverage=coverage))
        train_tokenizer(SENTENCES, config)
    for coverage in (0.9799, 1.0001):
        with pytest.raises(RuntimeError, match="character_coverage"):
            train_tokenizer(SENTENCES, TrainedTokenizerConfig(vocab_size=340, character_coverage=coverage))


@pytest.mark.parametrize(("texts", "max_bytes"), [(["\n\n", "\n"], 100), (SENTENCES, 3)])
def test_nothing_to_train_on_is_refused(texts: list[str], max_bytes: int) -> None:
    with pytest.raises(UserError, match=f"tokenizer.max_training_bytes={max_bytes} leaves no text"):
        train_tokenizer(texts, TrainedTokenizerConfig(vocab_size=300, max_training_bytes=max_bytes))


def test_the_embedded_corpus_survives(tokenizer: SentencePieceTokenizer) -> None:
    from rsotrain.data.readers import FileShard
    from rsotrain.data.sources import CORPUS

    texts = [row["text"] for _, row in FileShard(CORPUS / "validation.json.gz", ("text",)).rows()]
    assert len(texts) == 190
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


def test_a_damaged_model_is_one_sentence_or_a_model() -> None:
    """What is no SentencePiece model is refused, however it came about; the rest encodes and decodes."""
    model = train_tokenizer(SENTENCES * 5, CONFIG)
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        place = rng.randrange(len(model))
        damaged = rng.choice(
            [
                model[:place],
                model[:place] + bytes([model[place] ^ 1 << rng.randrange(8)]) + model[place + 1 :],
                model[:place] + b"\xff" + model[place + 1 :],
                model[:place] + model[place + 1 :],
                model[:place] + rng.randbytes(4) + model[place:],
            ]
        )
        try:
            tokenizer = SentencePieceTokenizer(damaged, "tokenizer.path=x")
        except UserError as error:
            refused += 1
            assert str(error).startswith("tokenizer.path=x ")  # noqa: PT017 (some of them are whole)
        else:
            assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode(["the ship é"])[0].tolist())
    assert refused > 200


# --- in a process of its own --------------------------------------------------------------------------


def test_another_process_trains_the_same_tokenizer_and_says_the_same_of_mistakes() -> None:
    assert train_tokenizer_apart(iter(SENTENCES * 5), CONFIG) == train_tokenizer(SENTENCES * 5, CONFIG)
    with pytest.raises(UserError, match=r"^tokenizer.vocab_size=\d+ is more than the training text can fill"):
        train_tokenizer_apart(["ab"], TrainedTokenizerConfig())


def test_ctrl_c_does_not_wait_for_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call would last for ever; its process is gone afterwards."""
    started: list[subprocess.Popen[bytes]] = []
    run = [sys.executable, "-c", "import time; time.sleep(1000)"]

    class Endless(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **settings: Any) -> None:
            super().__init__(run, **settings)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Endless)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer_apart(SENTENCES, CONFIG)
    assert started[0].wait(timeout=10) == -signal.SIGKILL


def test_a_killed_process_of_the_tokenizer_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(TrainingError, match=r"was killed by signal 9 .*tokenizer.max_training_bytes"):
        train_tokenizer_apart(SENTENCES, CONFIG)
