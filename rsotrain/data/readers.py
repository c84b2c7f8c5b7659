"""Files -> rows: JSON lines and text, plain or compressed, and tables.

The lines are parsed here rather than by ``load_dataset("json")``: that one infers a schema from the first
10 MB and then refuses a field that first occurs later, turns texts that look like dates into timestamps,
looks up a host, and cannot say which line is at fault.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rsotrain.config.data import SampleBy
from rsotrain.data.decompression import open_decompressed
from rsotrain.data.finding import JSON_SUFFIXES, TABLE_SUFFIXES, Stamp, data_suffix, file_stamp, shown
from rsotrain.data.rows import BadRow, Damaged, Lines, Position, Row, limited_lines, not_utf8, reason
from rsotrain.data.tables import table_rows
from rsotrain.errors import UserError

MAX_TEXT_BYTES = 64 * 2**20  # of a document in a text file
MAX_LINE_BYTES = 256 * 2**20  # of JSON, which may write a character in six bytes; bounds memory
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# Only strings are ever used, so a number of more digits than Python converts need not be known.
_without_numbers = json.JSONDecoder(parse_int=lambda _: 0)


@dataclass(frozen=True)
class FileShard:
    """One file. ``columns``: what is read of it, the first of them being the text.

    ``stamp``: of the file as its fingerprint was taken; one that has changed since is refused.
    """

    path: Path
    columns: tuple[str, ...]
    sample_by: SampleBy = SampleBy.document
    stamp: Stamp | None = None

    @property
    def name(self) -> str:
        return shown(self.path)

    @property
    def size(self) -> int:
        return (self.stamp or file_stamp(self.path))[0]

    @property
    def row_word(self) -> str:
        """What the documentation of a bad row calls it."""
        suffix = data_suffix(self.path)
        return "row" if suffix in TABLE_SUFFIXES else "line" if suffix in JSON_SUFFIXES else "text"

    def rows(
        self, first: int = 0, step: int = 1, position: Position | None = None
    ) -> Iterator[tuple[int, Row | BadRow]]:
        """(number, row) of the rows first, first + step, …; a row that cannot be parsed is what is wrong.

        Rows in between are passed over without being parsed. Raises UserError for a file that cannot be
        read, is damaged or has changed, or lacks a column.
        """
        suffix = data_suffix(self.path)
        self._check_unchanged()
        try:
            self._check_present()
            if suffix in TABLE_SUFFIXES:
                yield from table_rows(self.path, suffix, self.columns, first, step)
            else:
                with open_decompressed(self.path, position or Position()) as lines:
                    if suffix in JSON_SUFFIXES:
                        yield from _json_rows(lines, first, step)
                    else:
                        yield from self._text_rows(lines, first, step)
        except Damaged as error:
            self._check_unchanged()  # rather the cause than what came of it
            raise UserError(f"{self.name} is not a whole {error}; copy it again") from error
        except OSError as error:
            raise UserError(f"the data file {self.name} cannot be read ({reason(error)})") from error
        except MemoryError as error:
            raise UserError(f"the data file {self.name} takes more memory than there is; cut it") from error
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self.stamp is not None and file_stamp(self.path) != self.stamp:
            raise UserError(
                f"the data file {self.name} has changed since it was first looked at; start again when"
                " nothing writes to it"
            )

    def _check_present(self) -> None:
        with self.path.open("rb") as file:
            if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
                raise UserError(
                    f"{self.name} is a pointer of Git LFS to a file; fetch that with git lfs pull"
                )

    def _text_rows(self, lines: Lines, first: int, step: int) -> Iterator[tuple[int, Row | BadRow]]:
        match self.sample_by:
            case SampleBy.document:
                texts: Iterator[bytes | None] = iter([self._whole(lines)])
            case SampleBy.paragraph:
                texts = _paragraphs(lines)
            case SampleBy.line:
                texts = (line and line.rstrip(b"\r\n") for line in limited_lines(lines, MAX_TEXT_BYTES))
        for number, text in islice(enumerate(texts), first, None, step):
            where = f"{self.sample_by.name} {number + 1}"
            if text is None:
                yield number, _long(where, MAX_TEXT_BYTES)
                continue
            try:
                yield number, {self.columns[0]: text.decode("utf-8-sig")}
            except UnicodeDecodeError:
                yield number, not_utf8(where)

    def _whole(self, lines: Lines) -> bytes:
        text = lines.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise UserError(
                f"{self.name} is too large for one document; cut it with data.sample_by=paragraph or line"
            )
        return text


def _json_rows(lines: Lines, first: int, step: int) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in islice(enumerate(limited_lines(lines, MAX_LINE_BYTES)), first, None, step):
        if line is None:
            yield number, _long(f"line {number + 1}", MAX_LINE_BYTES)
        elif line.removeprefix(BYTE_ORDER_MARK).strip():
            try:
                yield number, parse_line(line, number)
            except BadRow as error:
                yield number, error


def parse_line(line: bytes, number: int) -> Row:
    """One JSON object, of the 0-based line ``number``. Raises BadRow with what is wrong with it.

    Of a key that stands there twice the last value counts.
    """
    where = f"line {number + 1}"
    try:
        row = _parsed(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(where) from error
    except RecursionError as error:
        raise BadRow(f"{where} is nested too deeply; leave such fields out") from error
    except ValueError as error:
        raise BadRow(f"{where} is not valid JSON ({reason(error)}); write one object a line") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where} is not a JSON object; write one object a line")
    return row


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of thousands of digits
        return _without_numbers.decode(text)


def _paragraphs(lines: Lines) -> Iterator[bytes | None]:
    """What stands between blank lines, in bounded memory; None for what is too long."""
    paragraph: list[bytes] = []
    size = 0

    def whole() -> bytes | None:
        return None if size > MAX_TEXT_BYTES else b"".join(paragraph).rstrip(b"\r\n")

    for line in limited_lines(lines, MAX_TEXT_BYTES):
        if line is None:
            size += MAX_TEXT_BYTES + 1
        elif not line.isspace():
            size += len(line)
            if size <= MAX_TEXT_BYTES:
                paragraph.append(line)
        elif size:
            yield whole()
            paragraph, size = [], 0
    if size:
        yield whole()


def _long(where: str, most: int) -> BadRow:
    return BadRow(f"{where} is longer than {most / 2**20:.0f} MiB; cut it into shorter ones")
