"""The tokenizer of a Hugging Face folder: byte-level BPE and whatever else a tokenizer.json describes."""

import hashlib
import json
import os
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


class HuggingFaceTokenizer:
    """A tokenizer.json in use, through the ``tokenizers`` package."""

    def __init__(self, files: dict[str, bytes], eos_id: int) -> None:
        from tokenizers import Tokenizer as Backend

        self._files = files
        self._backend = Backend.from_str(files[MAIN_FILE].decode())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "</s>" in a text is text
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values())
        self.eos_id = eos_id

    def __getstate__(self) -> tuple[dict[str, bytes], int]:
        return self._files, self.eos_id

    def __setstate__(self, state: tuple[dict[str, bytes], int]) -> None:
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
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        # A unigram model spells "</s>" as the piece itself where it lacks one of the characters, and a
        # separator inside a document must not be.
        return [i[i != self.eos_id] for i in ids]

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
    try:
        description = json.loads(files[MAIN_FILE])
        configuration = json.loads(files.get(OTHER_FILES[0], b"{}"))
        eos = _content(configuration.get("eos_token"))
        if eos is None:
            eos = _content(json.loads(files.get(OTHER_FILES[1], b"{}")).get("eos_token"))
        added = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
        if eos not in added:
            raise UserError(
                f"{name} names no end-of-sequence token: tokenizer_config.json should have an eos_token that"
                f" tokenizer.json lists among its added tokens (it has {eos!r})"
            )
        return HuggingFaceTokenizer(files, added[eos])
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"the tokenizer of {name} cannot be read ({str(error).splitlines()[0]})") from error


def _content(token: Any) -> str | None:
    """A token's text, which is either a string or the field of an object."""
    return token.get("content") if isinstance(token, dict) else token
