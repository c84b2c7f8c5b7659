"""What readers give and what can be wrong with it: one row, or the file that it should have come from."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from rsotrain.data.finding import shown
from rsotrain.errors import UserError

Row = Mapping[str, Any]

MAX_SHOWN_FIELDS = 20
PASSED_OVER_BYTES = 2**17  # at a time, of a line that is too long


class BadRow(UserError):  # noqa: N818 (it is a UserError)
    """What is wrong with one row; the file is as it should be otherwise."""


class Damaged(Exception):  # noqa: N818
    """A file that ends too early or makes no sense; the message names its kind."""


class Position:
    """How far a reader has come in the file that it has open, for a progress bar."""

    file: Any = None

    def bytes(self) -> int:
        return 0 if self.file is None or self.file.closed else self.file.tell()


class Lines(Protocol):
    """What text is read from: an open file, plain or decompressed."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readline(self, size: int = -1, /) -> bytes: ...


def not_utf8(where: str) -> BadRow:
    return BadRow(f"{where} is not UTF-8; convert the file, for example with iconv -t UTF-8")


def reason(error: BaseException) -> str:
    """What an error says, in one short line."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line for line in str(text).splitlines() if line.strip()]
    return shown(lines[0].strip()) if lines else type(error).__name__


def names(fields: Mapping[str, Any] | list[str]) -> str:
    """Field names for a message."""
    listed = sorted(map(str, fields))
    more = f" and {len(listed) - MAX_SHOWN_FIELDS} more" if len(listed) > MAX_SHOWN_FIELDS else ""
    return ", ".join(shown(name) for name in listed[:MAX_SHOWN_FIELDS]) + more or "none"


def splits(name: str) -> Iterator[tuple[str, str]]:
    """``a``, ``b.c`` and ``a.b``, ``c`` of ``a.b.c``: a field, and the one inside it that may be meant."""
    parts = name.split(".")
    return ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts)))


def value_of(row: Row, name: str) -> Any:
    """The value of a field; ``a.b`` is the field of that name or else the field b inside the field a.

    Raises KeyError where there is none.
    """
    if name in row:
        return row[name]
    for outer, inner in splits(name):
        if isinstance(row.get(outer), Mapping):
            try:
                return value_of(row[outer], inner)
            except KeyError:
                continue
    raise KeyError(name)


def outermost(name: str, columns: list[str]) -> str | None:
    """Which of the columns of a table holds a field: the one of its name, or one that it may be inside of."""
    if name in columns:
        return name
    return next((outer for outer, _ in splits(name) if outer in columns), None)


def limited_lines(lines: Lines, limit: int) -> Iterator[bytes | None]:
    """The lines with their ends; None for one of more than ``limit`` bytes, which is never held whole."""
    while line := lines.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = lines.readline(PASSED_OVER_BYTES)
        yield None
