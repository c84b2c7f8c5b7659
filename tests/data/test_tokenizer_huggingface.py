"""A tokenizer.json of any kind encodes as ``tokenizers`` does, or is refused with one sentence."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tokenizers_json
from tokenizers import Tokenizer

from rsotrain.config.data import TrainedTokenizerConfig
from rsotrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from rsotrain.data.tokenizer_huggingface import MOST_IDS, load_tokenizer
from rsotrain.errors import UserError

TEXTS = [
    *tokenizers_json.TEXTS[:2], "", " ", "  two  spaces ", "a\x00b\r\n\t", "é e\u0301 ﬁ 日本 🙂",
    "\ufeff▁", "<s> <unk> <0x0A>",
    "whale" * 30,
]  # fmt: skip


@pytest.mark.parametrize("kind", tokenizers_json.KINDS)
@pytest.mark.parametrize("processor", ["none", "bert"])
def test_every_kind_encodes_as_tokenizers_does(kind: str, processor: str, tmp_path: Path) -> None:
    theirs = tokenizers_json.build(kind, processor)
    ours = load_tokenizer(tokenizers_json.write(tmp_path, theirs))
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids.tolist())
    assert ours.vocab_size == theirs.get_vocab_size()
    again = pickle.loads(pickle.dumps(ours))
    assert again.fingerprint == ours.fingerprint
    assert [i.tolist() for i in again.encode(TEXTS)] == [i.tolist() for i in ours.encode(TEXTS)]


@pytest.mark.parametrize("kind", tokenizers_json.KINDS)
def test_the_separator_is_never_part_of_a_text(kind: str, tmp_path: Path) -> None:
    theirs = tokenizers_json.build(kind)
    if kind in ("wordpiece", "wordlevel"):
        from tokenizers import pre_tokenizers

        theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ours = load_tokenizer(tokenizers_json.write(tmp_path, theirs))
    for text in ("</s>", "a </s> b", "a</s>b", "</s></s>"):
        assert ours.eos_id not in ours.encode([text])[0]


Change = Callable[[dict[str, Any]], Any]


def nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = {"type": "Sequence", "normalizers": [value]}
    return value


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["model"]["vocab"].update(huge=1 << 31), f"has id {1 << 31} for 'huge'.*most {MOST_IDS}"),
        (lambda d: d["model"]["vocab"].update(huge=1 << 40), "cannot be used"),
        (lambda d: d["model"]["vocab"].update(huge=-1), "cannot be used"),
        (lambda d: d["model"]["vocab"].update(huge="1"), "cannot be used"),
        (lambda d: d["model"].update(merges=[["a"]]), "cannot be used"),
        (lambda d: d["model"].update(merges=[["not", "there"]]), "cannot be used"),
        (lambda d: d["model"].update(type="Other"), "cannot be used"),
        (lambda d: d.update(model=[]), "cannot be used"),
        (lambda d: d.pop("model"), "cannot be used"),
        (lambda d: d.update(added_tokens=None), "no end-of-sequence token"),
        (lambda d: d.update(added_tokens={"</s>": 2}), "no end-of-sequence token"),
        (lambda d: d.update(added_tokens=[1, {"content": ["</s>"]}]), "no end-of-sequence token"),
        (lambda d: d.update(normalizer=nested(200)), "cannot be used"),
        (lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 1}), "cannot be used"),
        (lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}}), "cannot be used"),
        (lambda d: d.update(model={"type": "WordLevel", "vocab": {"</s>": 2}, "unk_token": "x"}), "cannot"),
        (lambda d: d.update(model={"type": "Unigram", "vocab": [["</s>", 0.0]], "unk_id": None}), "cannot"),
    ],
)  # fmt: skip
def test_a_hostile_description_is_one_sentence(change: Change, sentence: str, tmp_path: Path) -> None:
    folder = tokenizers_json.write(tmp_path, tokenizers_json.build("bpe"))
    description = json.loads((folder / "tokenizer.json").read_text())
    change(description)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert_one_sentence(folder, sentence)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b'"text"', "is not a JSON object"),
    ],
    ids=["empty", "no UTF-8", "deep", "long integer", "list", "text"],
)
def test_a_damaged_file_is_one_sentence(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    folder = tokenizers_json.write(tmp_path, tokenizers_json.build("bpe"))
    (folder / name).write_bytes(content)
    assert_one_sentence(folder, sentence)


@pytest.mark.parametrize("eos", [None, 2, ["</s>"], {"content": 2}, "<none>", "x" * 5000])
def test_an_eos_token_of_another_type_is_one_sentence(eos: Any, tmp_path: Path) -> None:
    folder = tokenizers_json.write(tmp_path, tokenizers_json.build("bpe"), eos_token=eos)
    (folder / "special_tokens_map.json").unlink()
    assert_one_sentence(folder, "names no end-of-sequence token")


def test_a_cut_description_is_one_sentence(tmp_path: Path) -> None:
    folder = tokenizers_json.write(tmp_path, tokenizers_json.build("bpe"))
    whole = (folder / "tokenizer.json").read_bytes()
    for length in range(0, len(whole), 700):
        (folder / "tokenizer.json").write_bytes(whole[:length])
        assert_one_sentence(folder, "is not valid JSON")


def test_a_damaged_sentencepiece_model_is_one_sentence_or_works(tmp_path: Path) -> None:
    whole = train_tokenizer(tokenizers_json.TEXTS, TrainedTokenizerConfig("trained", vocab_size=300))
    rng = random.Random(0)
    sentences = []
    for round_number in range(300):
        model = bytearray(whole)
        if round_number % 3 == 0:
            model = model[: rng.randrange(len(model))]
        else:
            for _ in range(rng.randrange(1, 6)):
                model[rng.randrange(len(model))] = rng.randrange(256)
        try:
            tokenizer = SentencePieceTokenizer(bytes(model), "it")
        except UserError as error:
            sentences.append(str(error))
        else:
            assert max(i.max(initial=0) for i in tokenizer.encode(TEXTS)) < tokenizer.vocab_size
    assert len(sentences) > 100
    assert not any("\n" in sentence for sentence in sentences)


def assert_one_sentence(folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_tokenizer(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_ids_with_gaps_have_rows_for_all(tmp_path: Path) -> None:
    theirs = tokenizers_json.build("bpe")
    description = json.loads(theirs.to_str())
    description["model"]["vocab"]["far"] = 999
    folder = tokenizers_json.write(tmp_path, Tokenizer.from_str(json.dumps(description)))
    assert load_tokenizer(folder).vocab_size == 1000
