"""Files -> rows: JSON lines, Parquet, Arrow and text, plain or compressed with gzip, xz or zstd.

The lines are parsed here rather than by ``load_dataset("json")``: that one infers a schema from the first
10 MB and then refuses a field that first occurs later, turns texts that look like dates into timestamps,
looks up a host, and cannot say which line is at fault.
"""

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from rsotrain.config.data import SampleBy
from rsotrain.errors import UserError

Row = Mapping[str, Any]
Lines = BinaryIO | BufferedIOBase  # iterated over, and read

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")
TABLE_SUFFIXES = (".parquet", ".arrow")
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
GZIP, XZ, ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
ARROW_FILE = b"ARROW1"
TABLE_BATCH_ROWS = 256  # bounds memory: documents may be whole books
MAX_TEXT_BYTES = 64 * 2**20  # of a text file that is one document


class BadRow(UserError):  # noqa: N818 (it is a UserError)
    """What is wrong with one row; the file is as it should be otherwise."""


def data_suffix(path: Path) -> str:
    """``.json`` of ``a.json.gz``; the last suffix that is not a compression's, in lower case."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def find_files(path: str, key: str) -> list[Path]:
    """The data files that a file name, a folder or a glob stand for, sorted.

    Of a folder all that is not hidden. Raises UserError, with ``key`` in the sentence, where there is none,
    or one of an unknown kind.
    """
    known = JSON_SUFFIXES + TEXT_SUFFIXES + TABLE_SUFFIXES
    if not path:
        raise UserError(f"{key} is empty; give a file, a folder or a glob")
    given = Path(path).expanduser()
    if given.is_dir():
        inside = sorted(p for p in given.rglob("*") if p.is_file() and not is_hidden(p, given))
        files = [p for p in inside if data_suffix(p) in known]
        if not files:
            raise UserError(f"{key}={path} holds no data files ({', '.join(known)}, also compressed)")
        texts = [p for p in files if data_suffix(p) in TEXT_SUFFIXES]
        if texts and len(texts) < len(files):  # most often a README beside the data
            raise UserError(
                f"{key}={path} holds text ({texts[0].name}) beside JSON or tables; say which with a glob,"
                f" such as {key}='{path}/**/*.jsonl'"
            )
    elif given.is_file():
        files = [given]
    else:
        files = [Path(p) for p in sorted(glob.glob(str(given), recursive=True)) if Path(p).is_file()]
        if not files:
            raise UserError(f"{key}={path} is neither a file nor a folder, and no file matches it as a glob")
    for file in files:
        if data_suffix(file) not in known:
            raise UserError(
                f"{key}: {file} is of no known kind; its name should end in one of {', '.join(known)}"
                f" (and {', '.join(COMPRESSION_SUFFIXES)} where compressed)"
            )
        if file.stat().st_size == 0:
            raise UserError(f"{key}: {file} is empty; leave it out")
    return files


def is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


class Position:
    """How far a reader has come in the file that it has open, for a progress bar."""

    file: Any = None

    def bytes(self) -> int:
        return 0 if self.file is None or self.file.closed else self.file.tell()


@dataclass(frozen=True)
class FileShard:
    """One file. ``columns``: what is read of it, the first of them being the text."""

    path: Path
    columns: tuple[str, ...]
    sample_by: SampleBy = SampleBy.document

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

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
        read, is damaged, or lacks a column.
        """
        position = position or Position()
        suffix = data_suffix(self.path)
        try:
            if suffix in TABLE_SUFFIXES:
                yield from self._table_rows(suffix, first, step)
            else:
                with _open(self.path, position) as lines:
                    if suffix in JSON_SUFFIXES:
                        yield from _json_rows(lines, first, step)
                    else:
                        yield from self._text_rows(lines, first, step)
        except _Damaged as error:
            raise UserError(f"{self.path} is not a whole {error}; copy it again") from error
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"the data file {self.path} cannot be read ({reason})") from error

    def _text_rows(self, lines: Lines, first: int, step: int) -> Iterator[tuple[int, Row | BadRow]]:
        match self.sample_by:
            case SampleBy.document:
                texts: Iterator[bytes] = iter([self._whole(lines)])
            case SampleBy.paragraph:
                texts = _paragraphs(lines)
            case SampleBy.line:
                texts = (line.rstrip(b"\r\n") for line in lines)
        for number, text in islice(enumerate(texts), first, None, step):
            try:
                yield number, {self.columns[0]: text.decode("utf-8-sig")}
            except UnicodeDecodeError:
                yield number, _not_utf8(f"{self.sample_by.name} {number + 1}")

    def _whole(self, lines: Lines) -> bytes:
        text = lines.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise UserError(
                f"{self.path} is too large for one document; cut it with data.sample_by=paragraph or line"
            )
        return text

    def _table_rows(self, suffix: str, first: int, step: int) -> Iterator[tuple[int, Row | BadRow]]:
        import pyarrow as pa

        try:
            number = 0
            for batch in self._parquet_batches() if suffix == ".parquet" else self._arrow_batches():
                offset = max(first - number, (first - number) % step)
                if offset < batch.num_rows:
                    numbers = range(number + offset, number + batch.num_rows, step)
                    yield from zip(numbers, _plain_rows(batch, offset, step, number), strict=True)
                number += batch.num_rows
        except pa.ArrowInvalid as error:
            raise _Damaged(f"{suffix[1:].capitalize()} file ({str(error).splitlines()[0]})") from error

    def _parquet_batches(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            self._check_columns(file.schema_arrow.names)
            yield from file.iter_batches(TABLE_BATCH_ROWS, columns=list(self.columns))

    def _arrow_batches(self) -> Iterator[Any]:
        import pyarrow as pa

        with self.path.open("rb") as file:
            is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        with pa.memory_map(str(self.path)) as source:
            opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            self._check_columns(opened.schema.names)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
            for batch in batches:
                selected = batch.select(list(self.columns))
                for start in range(0, batch.num_rows, TABLE_BATCH_ROWS):
                    yield selected.slice(start, TABLE_BATCH_ROWS)

    def _check_columns(self, names: list[str]) -> None:
        for column in self.columns:
            if column not in names:
                raise UserError(
                    f"{self.path} has no column {column!r} (its columns: {', '.join(names)}); name the right"
                    " one in data.text_field (data=instructions: data.response_field, data.prompt_template)"
                )


def _plain_rows(batch: Any, offset: int, step: int, first: int) -> list[Row | BadRow]:
    """The rows offset, offset + step, … of an Arrow batch, whose own first is row ``first`` of the file."""
    places = list(range(offset, batch.num_rows, step))
    try:
        return batch.take(places).to_pylist()
    except UnicodeDecodeError:  # Arrow takes a writer's word for it that its strings are UTF-8
        return [_plain_row(batch.slice(place, 1), first + place) for place in places]


def _plain_row(batch: Any, number: int) -> Row | BadRow:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return _not_utf8(f"row {number + 1}")


class _Damaged(Exception):  # noqa: N818
    """A compressed file or table that ends too early or makes no sense; the message names its kind."""


@contextmanager
def _open(path: Path, position: Position) -> Iterator[Lines]:
    """The decompressed bytes of a file, whatever its name says."""
    with path.open("rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        position.file = raw
        if magic.startswith(GZIP):
            with gzip.open(raw) as file, _damage("gzip file", EOFError, gzip.BadGzipFile, zlib.error):
                yield file
        elif magic.startswith(XZ):
            with lzma.open(raw) as file, _damage("xz file", EOFError, lzma.LZMAError):
                yield file
        elif magic.startswith(ZSTD):
            import pyarrow as pa

            with _damage("zstd file", OSError), pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as file:
                yield BufferedReader(file)
        else:
            yield raw


@contextmanager
def _damage(kind: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise _Damaged(f"{kind} ({error})") from error


def _json_rows(lines: Lines, first: int, step: int) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in islice(enumerate(lines), first, None, step):
        if line.isspace():
            continue
        try:
            yield number, parse_line(line, number)
        except BadRow as error:
            yield number, error


def parse_line(line: bytes, number: int) -> Row:
    """One JSON object, of the 0-based line ``number``. Raises BadRow with what is wrong with it."""
    where = f"line {number + 1}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where} is not valid JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where} is not a JSON object; write one object a line")
    return row


def _not_utf8(where: str) -> BadRow:
    return BadRow(f"{where} is not UTF-8; convert the file, for example with iconv -t UTF-8")


def _paragraphs(lines: Lines) -> Iterator[bytes]:
    """What stands between blank lines, in bounded memory."""
    paragraph: list[bytes] = []
    for line in lines:
        if not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield b"".join(paragraph).rstrip(b"\r\n")
            paragraph = []
    if paragraph:
        yield b"".join(paragraph).rstrip(b"\r\n")
