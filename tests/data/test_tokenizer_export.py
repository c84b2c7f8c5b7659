"""Exported tokenizers give the same ids in ``transformers``, whatever SentencePiece was trained with."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from rsotrain.data.readers import FileShard
from rsotrain.data.sources import CORPUS
from rsotrain.data.tokenizer import SentencePieceTokenizer
from rsotrain.data.tokenizer_export import decodes_bytes_elsewhere, huggingface_files
from rsotrain.data.tokenizer_json import to_tokenizer_json
from rsotrain.errors import UserError

NASTY = [
    "", " ", "   ", "a", "  leading and trailing  ", "two  three   four    spaces", "\t tab\ttab \t", "\n",
    "line\nline\n\n\n", "a\r\nb\rc\r\n",
    "\x00", "nul\x00nul", "\x01\x1f\x7f\x85\xa0\u2028\u3000", "e\u0301 a\u0323\u0301\u0308 ﬁ\u0301",
    "\u0301 alone", "한국어 \u1112\u1161\u11ab",
    "ＡＢＣ　１２３ ｶﾞ", "ﬁn ﬂ ﬀ ½ ² ™", "👩\u200d👩\u200d👧 🙂 🇫🇷 1\ufe0f\u20e3", "\ufefftext", "▁",
    "▁▁ a▁b ▁", "<s>", "</s>", "a</s>b<s>", "<unk>", "<pad>",
    "<0x0A>", "x<0x0A><0xE2><0x96><0x81>y", "the<sep>sea[INST] [INST]the the ing", "<sep><sep>",
    "singing<sep", "1851 3.14 10,000", "日本語。",
    "zero\u200bwidth \U0010ffff \ufffd", "don't", "naïve café",
]  # fmt: skip
SYMBOLS = {"user_defined_symbols": ["<sep>", "[INST]", "the ", "ing", "\n", "7"]}
RAW = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
TIDY = {"normalization_rule_name": "identity"}  # extra spaces are removed, which is the trainer's default
SUFFIX = {"treat_whitespace_as_suffix": True}
BYTES = {"byte_fallback": True}
DESCRIBED = [
    RAW | BYTES | {"split_digits": True}, RAW, LLAMA,
    LLAMA | {"split_digits": True, "split_by_whitespace": False},
    TIDY, TIDY | BYTES, TIDY | BYTES | {"add_dummy_prefix": False}, TIDY | BYTES | SUFFIX,
    RAW | SUFFIX | {"add_dummy_prefix": True},
    LLAMA | SYMBOLS, RAW | BYTES | SYMBOLS, RAW | BYTES | {"user_defined_symbols": ["▁▁", "▁▁▁▁", "<sep>"]},
    LLAMA | {"control_symbols": ["<ctl>", "[X]"], "user_defined_symbols": ["<sep>"]},
]  # fmt: skip
MAPPED = [
    {"normalization_rule_name": "nmt_nfkc"}, {"normalization_rule_name": "nmt_nfkc_cf"} | BYTES,
    {"normalization_rule_name": "nfkc_cf"} | SYMBOLS,
    RAW | {"normalization_rule_name": "nfkc"} | BYTES,
]  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> list[str]:
    texts = [row["text"] for _, row in FileShard(CORPUS / "validation.json.gz", ("text",)).rows()]
    assert len(texts) == 190
    return texts


def train(documents: list[str], model_type: str, **options: Any) -> bytes:
    model = io.BytesIO()
    lines = [line for text in documents[:25] for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=model_type, vocab_size=600, pad_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, max_sentence_length=1 << 14, **options,
    )  # fmt: skip
    return model.getvalue()


def in_transformers(files: dict[str, bytes], folder: Path) -> Any:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)


def assert_equal_ids(theirs: Any, ours: SentencePieceTokenizer, texts: list[str]) -> None:
    """Of each text, after the separator that every document begins with."""
    assert theirs.bos_token_id == theirs.eos_token_id == ours.eos_id
    found = theirs(texts).input_ids
    for text, ids, right in zip(texts, found, ours.encode(texts), strict=True):
        assert ids == [ours.eos_id, *right.tolist()], repr(text[:80])


def assert_as_likely(theirs: Any, ours: SentencePieceTokenizer, texts: list[str]) -> None:
    """The same ids, or ids of the same log-probability as float32 adds it up over a document.

    Sums are from -4,000 to -16,000 here, where a last digit is 2^-12 to 2^-10: two pieces in place of two
    others that are less likely by a few of these may be taken by SentencePiece, and are not by tokenizers.
    """
    encoded = zip(theirs(texts, add_special_tokens=False).input_ids, ours.encode(texts), strict=True)
    differing = [(ids, right.tolist()) for ids, right in encoded if ids != right.tolist()]
    assert len(differing) < 0.1 * len(texts)
    scores = [0.0 if piece.type == 4 else piece.score for piece in ours.proto.pieces]
    for ids, right in differing:
        assert sum(scores[i] for i in ids) == pytest.approx(sum(scores[i] for i in right), abs=4 * 2**-10)
        assert ours.decode(ids) == ours.decode(right)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("options", DESCRIBED, ids=str)
def test_a_tokenizer_json_gives_the_same_ids(
    options: dict[str, Any], model_type: str, documents: list[str], tmp_path: Path
) -> None:
    ours = SentencePieceTokenizer(train(documents, model_type, **options))
    files = huggingface_files(ours, 64)
    assert "tokenizer.json" in files
    assert decodes_bytes_elsewhere(files)
    theirs = in_transformers(files, tmp_path)
    assert_equal_ids(theirs, ours, NASTY)
    if model_type == "unigram":
        assert_as_likely(theirs, ours, documents)
    else:
        assert_equal_ids(theirs, ours, documents)
    if options.get("byte_fallback") and not options.get("treat_whitespace_as_suffix"):
        for text, ids in zip(documents, ours.encode(documents), strict=True):
            assert theirs.decode(ids) == ours.decode(ids), text[:80]


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char", "word"])
@pytest.mark.parametrize("options", MAPPED, ids=str)
def test_a_model_with_a_character_map_is_run_by_sentencepiece_there(
    options: dict[str, Any], model_type: str, documents: list[str], tmp_path: Path
) -> None:
    ours = SentencePieceTokenizer(train(documents, model_type, **options))
    files = huggingface_files(ours, 64)
    assert "tokenizer.json" not in files
    assert decodes_bytes_elsewhere(files) == ("byte_fallback" not in options)
    assert_equal_ids(in_transformers(files, tmp_path), ours, documents + NASTY)


@pytest.mark.parametrize("options", [LLAMA, RAW | BYTES | SYMBOLS, TIDY], ids=str)
def test_a_model_of_whole_words_is_run_by_sentencepiece_there(
    options: dict[str, Any], documents: list[str], tmp_path: Path
) -> None:
    ours = SentencePieceTokenizer(train(documents, "word", **options))
    assert_equal_ids(in_transformers(huggingface_files(ours, 64), tmp_path), ours, documents + NASTY)


def test_symbols_of_the_user_are_whole_and_never_lost(documents: list[str], tmp_path: Path) -> None:
    for model_type in ("bpe", "unigram"):
        options = LLAMA | {"user_defined_symbols": ["<sep>", "[INST]"]}
        ours = SentencePieceTokenizer(train(documents, model_type, **options))
        theirs = in_transformers(huggingface_files(ours, 64), tmp_path)
        number = theirs.convert_tokens_to_ids("<sep>")
        assert ours.piece(number) == "<sep>"
        assert theirs("a<sep>b<sep><sep>").input_ids.count(number) == 3


def test_what_transformers_would_encode_otherwise_is_refused(documents: list[str]) -> None:
    # Words that are unknown as a whole: transformers looks the name "<s>" up, and finds the special piece.
    ours = SentencePieceTokenizer(train(documents, "word", **RAW))
    with pytest.raises(UserError, match=r"cannot be exported: transformers would give '<s>' other ids"):
        huggingface_files(ours, 64)


def test_a_wrong_description_is_never_written(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rsotrain.data import tokenizer_export

    ours = SentencePieceTokenizer(train(documents, "bpe", **LLAMA))
    wrong = json.loads(to_tokenizer_json(ours) or "")
    wrong["model"]["merges"] = wrong["model"]["merges"][:-1]
    monkeypatch.setattr(tokenizer_export, "to_tokenizer_json", lambda _: json.dumps(wrong))
    assert "tokenizer.json" not in huggingface_files(ours, 64)
    monkeypatch.setattr(SentencePieceTokenizer, "encode_by_pieces", lambda self, texts: [[0]] * len(texts))
    with pytest.raises(UserError, match="cannot be exported"):
        huggingface_files(ours, 64)


def test_equally_likely_pieces_may_come_in_another_order(documents: list[str], tmp_path: Path) -> None:
    """The one difference of unigram models: "-----" as "--", "-", "--" or as "-", "--", "--"."""
    ours = SentencePieceTokenizer(train(documents, "unigram", **TIDY))
    theirs = in_transformers(huggingface_files(ours, 64), tmp_path)
    for length in range(2, 60):
        (ids,) = ours.encode(["-" * length])
        assert sorted(theirs("-" * length, add_special_tokens=False).input_ids) == sorted(ids.tolist())
