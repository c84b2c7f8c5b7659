"""The tokenizer of a Hugging Face folder: byte-level BPE and whatever else a tokenizer.json describes."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rsotrain.data.tokenizer import SentencePieceTokenizer, Tokenizer
from rsotrain.errors import UserError

MAIN_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
MOST_IDS = 1 << 22  # an embedding has a row for each id; the largest vocabularies have a quarter of this
TRIAL = "A text: é 日本 🙂\n\t x9 \x00"  # has letters, marks and characters that few vocabularies know


class HuggingFaceTokenizer:
    """A tokenizer.json in use, through the ``tokenizers`` package.

    Raises UserError, with ``name`` in the sentence, for a description that ``tokenizers`` cannot run, that
    has ids too large for an embedding, or whose added tokens lack ``eos``.
    """

    def __init__(self, files: dict[str, bytes], eos: str, name: str = "the tokenizer") -> None:
        from tokenizers import Tokenizer as Backend

        self._files = files
        self.eos = eos
        try:
            self.description = _without_separator(_object(files[MAIN_FILE], f"{name}: {MAIN_FILE}"), eos)
            self._backend = Backend.from_str(json.dumps(self.description))
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True  # "</s>" in a text is text
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
            # what is wrong with a model without an unknown token, say, shows at the first unknown character
            self.decode(self._backend.encode(TRIAL, add_special_tokens=False).ids)
        except UserError:
            raise
        except BaseException as error:  # tokenizers raises bare Exceptions, and a panic is not even one
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{name}: {MAIN_FILE} cannot be used ({_first_line(error)})") from error
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        if self.vocab_size > MOST_IDS:
            largest = max(vocabulary, key=vocabulary.__getitem__)
            raise UserError(
                f"{name} has id {vocabulary[largest]} for {largest!r:.40}, and an embedding needs a row for"
                f" each id; at most {MOST_IDS} are read here"
            )
        if eos not in vocabulary:
            raise UserError(f"{name} has the end-of-sequence token {eos!r:.40}, but no id for it")
        self.eos_id: int = vocabulary[eos]

    def __getstate__(self) -> tuple[dict[str, bytes], str]:
        return self._files, self.eos

    def __setstate__(self, state: tuple[dict[str, bytes], str]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def use_threads(self, num_threads: int | None) -> None:
        """``tokenizers`` reads the number once, at its first use in a process."""
        if num_threads is not None:
            os.environ["RAYON_NUM_THREADS"] = str(num_threads)
            os.environ["TOKENIZERS_PARALLELISM"] = "false" if num_threads == 1 else "true"

    @property
    def files(self) -> dict[str, bytes]:
        return self._files

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._files[MAIN_FILE] + str(self.eos_id).encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or of a run.

    Raises UserError where there is none, or none that can be read, and where no end-of-sequence token is
    named.
    """
    try:
        for name in SENTENCEPIECE_FILES:
            if (folder / name).is_file() and not (folder / MAIN_FILE).is_file():
                return SentencePieceTokenizer((folder / name).read_bytes(), str(folder / name))
        if not (folder / MAIN_FILE).is_file():
            raise UserError(f"{folder} holds no tokenizer ({MAIN_FILE} or {SENTENCEPIECE_FILES[0]})")
        files = {
            name: (folder / name).read_bytes()
            for name in (MAIN_FILE, *SENTENCEPIECE_FILES, *OTHER_FILES)
            if (folder / name).is_file()
        }
    except OSError as error:
        raise UserError(f"the tokenizer in {folder} cannot be read ({error.strerror})") from error
    return from_files(files, str(folder))


def from_files(files: dict[str, bytes], name: str) -> HuggingFaceTokenizer:
    """The tokenizer of the files of a folder, by name. Raises UserError as ``load_tokenizer`` does."""
    description, configuration, special = (
        _object(files.get(file, b"{}"), f"{name}: {file}") for file in (MAIN_FILE, *OTHER_FILES)
    )
    eos = _content(configuration.get("eos_token")) or _content(special.get("eos_token"))
    added = description.get("added_tokens")
    names = [_content(token) for token in added] if isinstance(added, list) else []
    if eos is None or eos not in names:
        raise UserError(
            f"{name} names no end-of-sequence token: tokenizer_config.json should have an eos_token that"
            f" tokenizer.json lists among its added tokens (it has {eos!r:.40})"
        )
    return HuggingFaceTokenizer(files, eos, name)


def _without_separator(description: dict[str, Any], eos: str) -> dict[str, Any]:
    """The description of the same tokenizer, but that it leaves out ``eos`` where a text spells it.

    A separator inside a document must not be. Models other than BPE give its id where a word is its name,
    and unigram models where any part of a word is; the pre-tokenizer takes these away.
    """
    model = description.get("model")
    if not isinstance(model, dict):
        return description  # which tokenizers refuses
    kind = model.get("type")
    if kind == "BPE" and not model.get("ignore_merges"):
        return description
    pattern = {"String": eos} if kind == "Unigram" else {"Regex": rf"\A{re.escape(eos)}\z"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": False}
    before = description.get("pre_tokenizer")
    parts: Any = [] if before is None else [before]
    if isinstance(before, dict) and before.get("type") == "Sequence":
        parts = before.get("pretokenizers")
    if not isinstance(parts, list) or split in parts:
        return description
    return description | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*parts, split]}}


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({_first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object; copy the folder again")
    return value


def _content(token: Any) -> str | None:
    """A token's text, which is either a string or the field of an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
