"""Files that are written whole or not at all, read within limits, and what JSON can hold."""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from rsotrain.errors import UserError

MAX_JSON_BYTES, MAX_YAML_BYTES = 2**24, 2**18  # of records that runs write; YAML is slow to read
MAX_DEPTH, MAX_NODES = 50, 100_000
MAX_INTEGER = 10**30
_OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def finite(value: object) -> object:
    """``value`` with every NaN and infinity in it replaced by None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader, or a crash, sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json_atomic(path: Path, mapping: Mapping[str, object]) -> None:
    """Write ``mapping`` as indented JSON, all or nothing; NaN and infinities become null.

    Raises TypeError for a value that JSON cannot hold and leaves an existing file as it was.
    """
    write_atomic(path, json.dumps(finite(mapping), indent=2, allow_nan=False) + "\n")


# --- reading -------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError where it cannot be read or is out of limits."""
    content = _bytes_of(path, MAX_JSON_BYTES)
    try:
        return within_limits(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, which may be a date or a set, too. Raises UserError as ``read_json`` does."""
    content = _bytes_of(path, MAX_YAML_BYTES)
    try:
        text = content.decode()
        _check_tokens(text)
        return within_limits(yaml.safe_load(text))
    # PyYAML's constructors of integers, truth values and dates are careless with what they are given.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def _check_tokens(text: str) -> None:
    """Raise ValueError for what would overflow the stack of a parser, or the memory."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deep")
        if isinstance(token, yaml.AliasToken):  # a few lines of them stand for gigabytes
            raise ValueError("it uses aliases")


def open_regular(path: Path) -> BinaryIO:
    """``path`` for reading; a FIFO or a device, which may wait or go on for ever, is a UserError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} cannot be read: it is not a regular file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def lines_within(path: Path, limit: int) -> Iterator[bytes]:
    """The lines of a file of any size, without those of more than ``limit`` bytes. Raises UserError."""
    with open_regular(path) as file:
        try:
            while line := file.readline(limit):
                if line.endswith(b"\n") or len(line) < limit:
                    yield line
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(limit)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _bytes_of(path: Path, limit: int) -> bytes:
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > limit:
        raise UserError(f"{path} cannot be read: it has more than {limit:,} bytes")
    return content


def within_limits(content: Any) -> Any:
    """``content`` of JSON or YAML, which can now be walked through and printed. Raises ValueError."""
    level, number = [content], 0
    for _ in range(MAX_DEPTH):
        number += len(level)
        if number > MAX_NODES:
            raise ValueError(f"it holds more than {MAX_NODES:,} values")
        if any(isinstance(node, int) and abs(node) > MAX_INTEGER for node in level):
            raise ValueError("it holds an integer of too many digits")
        level = [item for node in level for item in _items(node)]
        if not level:
            return content
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _items(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        yield from node.keys()
        yield from node.values()
    elif isinstance(node, list | tuple | set):
        yield from node


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split()) or type(error).__name__
