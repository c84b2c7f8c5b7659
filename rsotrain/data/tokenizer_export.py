"""A tokenizer as the files that ``transformers`` loads: the same ids for every text, or none at all."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from rsotrain.data.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer
from rsotrain.data.tokenizer_huggingface import MAIN_FILE, OTHER_FILES, HuggingFaceTokenizer
from rsotrain.data.tokenizer_json import (
    BYTE,
    NORMAL,
    UNIGRAM,
    USER_DEFINED,
    separator_first,
    text_score,
    to_tokenizer_json,
)
from rsotrain.errors import UserError

PROBES = (
    "", " ", "  ", "a", " a", "a ", "  a  b  ", "\n", "\r\n", "a\r\nb\rc", "\t a\tb \t", "a\n\n\n  b\n ",
    "\x00", "a\x00b",
    "\x01\x1f\x7f\x85\xa0\u2028\u3000", "e\u0301", "a\u0323\u0301\u0308", "ﬁ\u0301", "\u0301",
    "각ᆨ\u1100\u1161\u11a8",
    "ＡＢＣ　１２３", "ｶﾞｷﾞ", "ﬁnﬂﬀ", "½ ² ™ ①", "İıßẞſ", "日本語。한국어",
    "👩\u200d👩\u200d👧 🙂 🇫🇷 1\ufe0f\u20e3", "\ufefftext", "zero\u200bwidth\u200e",
    "\ufffd \U0010ffff \ue000", SPACE_MARK, SPACE_MARK * 3, f"a{SPACE_MARK}b",
    f" {SPACE_MARK} a {SPACE_MARK}", "<s>", "</s>", "a</s>b <s>",
    "<unk>", "<pad>", "<0x0A>", "x<0x0A><0xE2>y", "⁇ \u2047", "1851 3.14 10,000", "don't DON'T", "a" * 50,
    " " * 50 + "a", "-" * 33, "====",
)  # fmt: skip
RANDOM_PROBES = 400
ROUNDINGS = 32  # sums in float32 between two places where two ways to cut a text agree, generously


def huggingface_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """The content of each file, by its name.

    Each text begins with the separator there, as every document does in training.
    A SentencePiece model comes with a tokenizer.json where ``tokenizers`` can run it, otherwise it is run
    by the ``sentencepiece`` package there, too. Raises UserError where neither gives the ids that it gives
    here, on texts chosen to tell them apart.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer, max_length)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _from_huggingface(tokenizer, max_length)
    raise TypeError(f"no export for {type(tokenizer).__name__}")


def decodes_bytes_elsewhere(files: dict[str, bytes]) -> bool:
    """Whether ``transformers`` writes bytes as text; models without a tokenizer.json show their names."""
    from sentencepiece import sentencepiece_model_pb2

    if MAIN_FILE in files:
        return True
    proto = sentencepiece_model_pb2.ModelProto.FromString(files["tokenizer.model"])
    return all(piece.type != BYTE for piece in proto.pieces)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer, max_length: int) -> dict[str, bytes]:
    files = dict(tokenizer.files)
    eos = tokenizer.piece(tokenizer.eos_id)
    texts = list(_probes(tokenizer))
    expected = tokenizer.encode(texts)
    configuration: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # "</s>" in a text is text
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    described = to_tokenizer_json(tokenizer)
    scores = unigram_scores(tokenizer)
    if described is not None and _other(_encode(described, texts), expected, scores) is None:
        files[MAIN_FILE] = described.encode()
    elif (other := _other(tokenizer.encode_by_pieces(texts), expected)) is None:
        configuration |= {"tokenizer_class": "SentencePieceBackend", "special_tokens_pattern": "bos"}
    else:
        raise UserError(
            f"this SentencePiece model cannot be exported: transformers would give {texts[other]!r:.60} other"
            " ids; use one of type bpe or unigram that has a piece for each byte"
        )
    files[OTHER_FILES[0]] = _json(configuration)
    return files


def _encode(described: str, texts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(described)
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _other(
    ids: list[list[int]], expected: list[np.ndarray], scores: dict[int, float] | None = None
) -> int | None:
    """The number of the first text with other ids; with ``scores``, with less likely ones."""
    for number, (mine, theirs) in enumerate(zip(ids, expected, strict=True)):
        right = theirs.tolist()
        if mine != right and not (scores and as_likely(mine, right, scores)):
            return number
    return None


def unigram_scores(tokenizer: SentencePieceTokenizer) -> dict[int, float] | None:
    """id -> log-probability of each piece that is text; None for a model that is not unigram."""
    proto = tokenizer.proto
    if proto.trainer_spec.model_type != UNIGRAM:
        return None
    return {
        i: text_score(piece.piece, piece.type, piece.score)
        for i, piece in enumerate(proto.pieces)
        if piece.type in (NORMAL, USER_DEFINED)
    }


def as_likely(mine: list[int], theirs: list[int], scores: dict[int, float]) -> bool:
    """Whether a unigram model gives two ways to write a text the same probability, as float32 adds it up.

    "-----" is "--", "--" and "-" in any order. Which one SentencePiece takes depends on how the sum over
    the text before it was rounded; ``tokenizers`` adds in float64.
    """
    here, there = Counter(mine), Counter(theirs)
    more, less = here - there, there - here
    if not (more.keys() | less.keys()) <= scores.keys():
        return False
    apart = sum(scores[i] * n for i, n in more.items()) - sum(scores[i] * n for i, n in less.items())
    return abs(apart) <= ROUNDINGS * 2**-24 * abs(sum(scores.get(i, 0.0) for i in theirs))


def _probes(tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    """Texts that have told tokenizers apart: fixed ones, every piece, and pieces in random company."""
    yield from PROBES
    pieces = [piece.piece.replace(SPACE_MARK, " ") for piece in tokenizer.proto.pieces]
    for piece in pieces:
        yield piece
        yield f"a{piece}{piece} b"
    rng = random.Random(0)
    for _ in range(RANDOM_PROBES):
        words = rng.choices(pieces, k=rng.randrange(2, 20)) + rng.choices(PROBES, k=rng.randrange(3))
        rng.shuffle(words)
        yield "".join(words)
    characters = sorted({character for piece in pieces for character in piece[:3]})
    for _ in range(RANDOM_PROBES):
        few = rng.choices(characters, k=4)
        yield "".join(rng.choices(few, k=rng.randrange(2, 40)))


def _from_huggingface(tokenizer: HuggingFaceTokenizer, max_length: int) -> dict[str, bytes]:
    """The folder's own files, except for what is put before and after a text there."""
    files = dict(tokenizer.files)
    description = dict(tokenizer.description)
    configuration = json.loads(files.get(OTHER_FILES[0], b"{}"))
    eos = tokenizer.eos
    description["truncation"] = description["padding"] = None
    description["post_processor"] = _with_separator(description.get("post_processor"), eos, tokenizer.eos_id)
    special = {"bos_token": eos, "eos_token": eos}
    # A chat template writes its special tokens as text; without one, text is only text.
    split = "chat_template" not in configuration
    configuration |= special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": split,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("auto_map", "max_length", "truncation_side", "post_processor"):
        configuration.pop(name, None)
    files[MAIN_FILE] = _json(description)
    files[OTHER_FILES[0]] = _json(configuration)
    if OTHER_FILES[1] in files:
        files[OTHER_FILES[1]] = _json(json.loads(files[OTHER_FILES[1]]) | special)
    return files


def _with_separator(processor: dict[str, Any] | None, token: str, number: int) -> dict[str, Any]:
    """The post-processor without what adds tokens, and with the separator before each text."""
    parts = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    kept = [part for part in parts if part and part["type"] == "ByteLevel"]
    ours = json.loads(separator_first(token, number).__getstate__())
    return {"type": "Sequence", "processors": [*kept, ours]} if kept else ours


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
