"""Text <-> ids: what every tokenizer offers, SentencePiece models, and training one on documents."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from rsotrain.config.data import TrainedTokenizerConfig
from rsotrain.errors import UserError

PIECE_CHARACTERS = 4096  # longest string shown to the trainer
PIECES_WITHOUT_TEXT = 259  # three special ones and the bytes
_NO_CHARACTERS = re.compile(
    r"\[\(?all_chars_count|\[!required_chars_\.empty\(\)\]"
)  # of SentencePiece's errors
SPACE_MARK = "\u2581"  # SentencePiece writes a space so, and would read the character itself as a space
WORD = 3  # TrainerSpec.ModelType


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer; picklable.

    ``vocab_size`` is above every id. ``eos_id`` separates documents and is never part of an encoded text.
    """

    vocab_size: int
    eos_id: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that determines the ids, in hexadecimal."""

    @property
    def files(self) -> dict[str, bytes]:
        """What a Hugging Face folder holds of it, by file name."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, without special ones: int32, on ``num_threads`` cores."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ones are dropped."""

    def use_threads(self, num_threads: int | None) -> None:
        """How many cores ``encode`` may take; null: all."""


class SentencePieceTokenizer:
    """A serialised SentencePiece model in use.

    With a model of ``train_tokenizer``, ``decode(encode([text])[0]) == text`` for every text. Raises
    UserError, with ``name`` in the sentence, for bytes that are no model and for special ids that make no
    sense: without eos documents could not be told apart.
    """

    def __init__(self, model: bytes, name: str = "the tokenizer") -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError, ValueError) as error:  # ValueError: a message that is not UTF-8
            raise UserError(f"{name} is not a SentencePiece model; give a tokenizer.model file") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self.num_threads = -1
        if not 0 <= self.eos_id < self.vocab_size or not self._processor.is_control(self.eos_id):
            raise UserError(
                f"{name} has no end-of-sequence piece (its eos id is {self.eos_id}); train one with eos_id"
            )
        if self.eos_id in (self.bos_id, self.unk_id):
            raise UserError(f"{name} uses id {self.eos_id} for eos and for another special piece")

    def __getstate__(self) -> tuple[bytes, int]:
        return self.model, self.num_threads

    def __setstate__(self, state: tuple[bytes, int]) -> None:
        self.__init__(state[0])  # type: ignore[misc]
        self.num_threads = state[1]

    def use_threads(self, num_threads: int | None) -> None:
        self.num_threads = -1 if num_threads is None else num_threads

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    def piece(self, number: int) -> str:
        """The piece of an id."""
        return self._processor.id_to_piece(number)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    @cached_property
    def _space_mark_ids(self) -> np.ndarray:
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        return np.array([self._processor.piece_to_id(piece) for piece in pieces], np.int32)

    @cached_property
    def proto(self) -> Any:
        """The model as ``sentencepiece_model_pb2.ModelProto``."""
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self.model)

    @cached_property
    def keeps_space_marks(self) -> bool:
        """Whether the character can be spelled in bytes, and texts be encoded in parts around it.

        Not where a character map says what becomes of it, nor where words are found by it.
        """
        by_words = self.proto.trainer_spec.model_type == WORD
        if self.unk_id in self._space_mark_ids or by_words or self.proto.normalizer_spec.precompiled_charsmap:
            return False
        return self.decode(self._encode_space_marks(f" a{SPACE_MARK} a")) == f" a{SPACE_MARK} a"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        ids = self._processor.encode(texts, return_type="numpy", num_threads=self.num_threads)
        for i, text in enumerate(texts):
            if SPACE_MARK in text and self.keeps_space_marks:
                ids[i] = self._encode_space_marks(text)
        return ids

    def _encode_space_marks(self, text: str) -> np.ndarray:
        """As ``encode``, with each character U+2581 as its three bytes."""
        first, *rest = self._processor.encode(text.split(SPACE_MARK), return_type="numpy")
        return np.concatenate([first, *(ids for part in rest for ids in (self._space_mark_ids, part))])

    def encode_by_pieces(self, texts: list[str]) -> list[list[int]]:
        """As the ``SentencePieceBackend`` of transformers: the ids of the pieces that a text is cut into."""
        cut = self._processor.encode(texts, out_type=str, num_threads=self.num_threads)
        return [[self._processor.piece_to_id(piece) for piece in pieces] for pieces in cut]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(i) for i in ids])


def _pieces(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines, the long ones in parts, until ``max_bytes`` of UTF-8 are reached.

    By lines, so that a line break is a byte of its own and never part of a longer piece; in parts, because
    SentencePiece drops what is longer than its limit.
    """
    num_bytes = 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), PIECE_CHARACTERS):
                piece = line[start : start + PIECE_CHARACTERS]
                num_bytes += len(piece.encode())
                if num_bytes > max_bytes:
                    return
                yield piece


def train_tokenizer(texts: Iterable[str], config: TrainedTokenizerConfig) -> bytes:
    """A serialised model with byte fallback; the same one for the same texts and settings.

    unk 0, bos 1, eos 2, then the 256 bytes; digits are split; nothing is normalised, no space is added or
    removed. Raises UserError when the texts cannot fill ``vocab_size`` pieces, or do not fit into them, with
    the number that would do.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_pieces(texts, config.max_training_bytes),
            model_writer=model,
            model_type=config.model_type.name,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * PIECE_CHARACTERS,  # bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # written into the model: the machine must not change the fingerprint
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error)
        if "sentences_.empty()" in reason:
            raise UserError(
                f"tokenizer.max_training_bytes={config.max_training_bytes} leaves no text to train on;"
                " raise it, or give other documents"
            ) from error
        largest = re.search(r"too high .* <= (\d+)", reason)
        if _NO_CHARACTERS.search(reason) or (largest and int(largest[1]) <= PIECES_WITHOUT_TEXT):
            raise UserError(
                "the training text has no characters that a tokenizer could learn; give other documents"
            ) from error
        if largest:
            raise UserError(
                f"tokenizer.vocab_size={config.vocab_size} is more than the training text can fill (at most"
                f" {largest[1]}); give a smaller one, or more text"
            ) from error
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            raise UserError(
                f"tokenizer.vocab_size={config.vocab_size} is too small for the characters of the training"
                f" text, which take {needed[1]} pieces; raise it, or lower tokenizer.character_coverage"
            ) from error
        raise
    return model.getvalue()


TOKENIZER_FOLDER = "tokenizer"  # of a run


def save_tokenizer(tokenizer: Tokenizer, run_folder: Path) -> None:
    """Keep a run's tokenizer beside its checkpoints, so that these can be used without the data."""
    folder = run_folder / TOKENIZER_FOLDER
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
