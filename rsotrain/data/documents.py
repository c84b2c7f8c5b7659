"""Rows -> documents: which field of a row is text, which documents belong to a part, which rows are bad."""

import heapq
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from rsotrain.data.rows import BadRow, Position, Row, names, value_of
from rsotrain.errors import UserError

Notify = Callable[[str], None]

SAMPLE_PIECE_CHARACTERS = 1 << 14
NUM_BAD_ROWS_SHOWN = 5
PROGRESS_DOCUMENTS = 64


class Document(NamedTuple):
    """``prompt`` comes before ``text`` and is not trained on."""

    text: str
    prompt: str = ""


class Fields(Protocol):
    """What turns a row into a document; raises BadRow with what is wrong with the row."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, row: Row, where: str) -> Document: ...


@dataclass(frozen=True)
class TextField:
    """``name``: of the field, or ``outer.inner`` for one inside another."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self, row: Row, where: str) -> Document:
        return Document(_string(row, self.name, where, "data.text_field"))


@dataclass(frozen=True)
class InstructionFields:
    """A template such as "Q: {question}\\nA: " and the field that holds the response."""

    template: str
    response: str

    @property
    def columns(self) -> tuple[str, ...]:
        inserted = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        return tuple(dict.fromkeys([self.response, *inserted]))

    def __call__(self, row: Row, where: str) -> Document:
        prompt = []
        for text, name, _, _ in string.Formatter().parse(self.template):
            prompt.append(text)
            if name is not None:  # which may be that of a field inside another
                prompt.append(_string(row, name, where, "data.prompt_template", _example))
        response = _string(row, self.response, where, "data.response_field", _example)
        return Document(response, "".join(prompt))


def _example(row: Row) -> str:
    """Settings of data=instructions that would fit the row, as far as its fields can tell; or nothing."""
    texts = [name for name, value in row.items() if isinstance(value, str) and name.isidentifier()]
    if len(texts) < 2:
        return ""
    return f" (for example \"data.prompt_template='{{{texts[0]}}}'\" data.response_field={texts[1]})"


def _no_example(row: Row) -> str:
    return ""


def _string(row: Row, name: str, where: str, key: str, example: Callable[[Row], str] = _no_example) -> str:
    try:
        text = value_of(row, name)
    except KeyError as error:
        raise BadRow(
            f"{where} has no field {name!r} (its fields: {names(row)}); give the right one with"
            f" {key}=…{example(row)}"
        ) from error
    if not isinstance(text, str):
        raise BadRow(
            f"{where} has a value of type {type(text).__name__} in the field {name!r}; make it a string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is no character
        raise BadRow(f"{where} holds half a surrogate pair; write its text as valid Unicode") from error
    return text


class Shard(Protocol):
    """An ordered part of a corpus that can be read from any row on; picklable."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes, or 0 where that is not known."""

    @property
    def row_word(self) -> str:
        """What a message calls a row: line, row."""

    def rows(
        self, first: int = 0, step: int = 1, position: Position | None = None
    ) -> Iterator[tuple[int, Row | BadRow]]: ...


class Part(Enum):
    """All documents, or those whose text's hash lies above or below the held-out fraction.

    Of a few long texts (``Corpus.by_ends``) the beginning or the end of each, instead.
    """

    whole = "whole"
    train = "train"
    held_out = "held_out"


class BadRows:
    """Counts the rows that are passed over and stops when there are more than ``limit``."""

    def __init__(self, limit: int, notify: Notify) -> None:
        self.limit = limit
        self.notify = notify
        self.count = 0

    def add(self, shard: str, error: BadRow) -> None:
        self.count += 1
        if self.count > self.limit:
            allowed = f"; data.max_bad_rows={self.limit} allows no more bad rows" if self.limit else ""
            raise UserError(f"{shard}: {error}{allowed}") from error
        if self.count <= NUM_BAD_ROWS_SHOWN:
            self.notify(f"warning: {shard}: {error}; skipped")


@dataclass(frozen=True)
class Corpus:
    """Shards in order, and what of them is a document.

    ``by_ends``: the held-out part is the end of each document. ``remote``: the shards come over a network, so
    none should be read twice. ``fingerprint``: of the bytes, or of whatever else determines them. ``note``:
    what a user should hear of before it is read.
    """

    name: str
    shards: tuple[Shard, ...]
    fields: Fields
    fingerprint: str
    part: Part = Part.whole
    fraction: float = 0.0
    by_ends: bool = False
    max_bad_rows: int = 0
    remote: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    note: str | None = None

    def key(self) -> dict[str, Any]:
        """All that determines the documents, for the key of a cached file."""
        key = {"source": self.fingerprint, "columns": list(self.fields.columns), **self.settings}
        if isinstance(self.fields, InstructionFields):
            key["template"] = self.fields.template
        if self.part is not Part.whole:
            key |= {"part": self.part.name, "fraction": self.fraction}
        if self.by_ends:
            key["by_ends"] = True
        return key

    @property
    def described(self) -> str:
        """The name, and which part of it this is."""
        words = {Part.whole: "", Part.train: "the training part of ", Part.held_out: "the held-out part of "}
        return words[self.part] + self.name

    def shard_documents(
        self,
        index: int,
        bad: BadRows,
        *,
        first: int = 0,
        step: int = 1,
        position: Position | None = None,
    ) -> Iterator[tuple[int, Document]]:
        """(row, document) of the rows first, first + step, … of a shard that are in this part and not empty.

        Raises UserError for a damaged file and for more bad rows than ``bad`` allows.
        """
        shard = self.shards[index]
        for number, row in shard.rows(first, step, position):
            try:
                if isinstance(row, BadRow):
                    raise row
                document = self.fields(row, f"{shard.row_word} {number + 1}")
            except BadRow as error:
                bad.add(shard.name, error)
                continue
            if document.text and (own := self._own(document)).text:
                yield number, own

    def documents(self, notify: Notify, progress: Callable[[int], None] | None = None) -> Iterator[Document]:
        """All documents, in order; ``progress`` is told now and then how many bytes of the files are read."""
        bad = BadRows(self.max_bad_rows, notify)
        done = 0
        for index, shard in enumerate(self.shards):
            position = Position()
            documents = self.shard_documents(index, bad, position=position)
            for count, (_, document) in enumerate(documents):
                yield document
                if progress is not None and count % PROGRESS_DOCUMENTS == 0:
                    progress(done + position.bytes())
            done += shard.size
        if bad.count > NUM_BAD_ROWS_SHOWN:
            notify(f"warning: {self.name}: {bad.count} bad rows were skipped")

    def _own(self, document: Document) -> Document:
        """What of a document is in this part; it has no text where nothing is."""
        if self.part is Part.whole:
            return document
        if self.by_ends:
            end = _begin_of_end(document.text, self.fraction)
            own = document.text[:end] if self.part is Part.train else document.text[end:]
            return document._replace(text=own)
        own_hash = is_held_out(document, self.fraction) == (self.part is Part.held_out)
        return document if own_hash else Document("")


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document, as a whole, is one of those to validate on."""
    return _hash(document.prompt + document.text) < fraction * 2**64


def _begin_of_end(text: str, fraction: float) -> int:
    """Where the last ``fraction`` of a text begins: after the next space or line break, if there is one."""
    begin = round(len(text) * (1 - fraction))
    space = re.compile(r"\s").search(text, begin)
    return space.end() if space is not None and space.end() < len(text) else begin


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def batches(documents: Iterator[Document], max_bytes: int) -> Iterator[list[Document]]:
    """Lists of consecutive documents with about ``max_bytes`` characters, or one longer document."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + len(document.prompt)
        if size >= max_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def sample_texts(documents: Iterator[Document], max_bytes: int, read_bytes: int | None) -> list[str]:
    """A fair sample of ``max_bytes`` of text and what is left of the last piece, in a random but fixed order.

    As many pieces with the smallest hashes as it takes: so the order of the documents does not matter,
    and memory holds the sample only. ``read_bytes``: stop reading there; null: read all.
    """
    kept: list[tuple[int, str]] = []  # a heap whose first is the next to go
    kept_bytes = seen_bytes = 0
    for document in documents:
        text = document.prompt + document.text
        for start in range(0, len(text), SAMPLE_PIECE_CHARACTERS):
            piece = text[start : start + SAMPLE_PIECE_CHARACTERS]
            seen_bytes += len(piece.encode())
            kept_bytes += len(piece.encode())
            heapq.heappush(kept, (-_hash(piece), piece))
            while kept_bytes - len(kept[0][1].encode()) >= max_bytes:
                kept_bytes -= len(heapq.heappop(kept)[1].encode())
        if read_bytes is not None and seen_bytes >= read_bytes:
            break
    return [piece for _, piece in sorted(kept, reverse=True)]
