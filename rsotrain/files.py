"""Files that are written whole or not at all, read within limits, and what JSON can hold.

Whatever lies in a run folder may be damaged or somebody else's: ``read_json`` and ``read_yaml`` neither hang
nor fill the memory, and say in one sentence what is wrong. ``os_errors_said`` does so for the disk.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from rsotrain.errors import TrainingError, UserError

MAX_JSON_BYTES = 64 * 2**20  # the position in streamed data may be long
MAX_YAML_BYTES = 2**20  # the parser is slow, and a config.yaml has some KiB
MAX_DEPTH = 100
MAX_VALUES = 5_000_000
MAX_INTEGER = 10**30
MAX_YAML_NODES = 200_000  # aliases counted as often as they are used
MAX_YAML_SCALAR = 1000  # characters of what is read as a number or a date


def finite(value: object) -> object:
    """``value`` with every NaN and infinity in it replaced by None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


# --- errors of the disk --------------------------------------------------------------------------

# Those who lose the number of an error on the way still quote it: safetensors and torch.distributed.
_LACK_OF_ROOM = re.compile(rf"(?:os error|Errno) (?:{errno.ENOSPC}|{errno.EDQUOT})\b")


def lacks_room(error: OSError) -> bool:
    """Would deleting something elsewhere help?"""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or _LACK_OF_ROOM.search(str(error)) is not None


def reason(error: OSError) -> str:
    """What the system says, in a few words, and the advice to make room where that is what it lacks."""
    said = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{said}; make room on that disk" if lacks_room(error) else said


@contextmanager
def os_errors_said(what: str, kind: type[UserError] | type[TrainingError] = UserError) -> Iterator[None]:
    """Turn an OSError into one sentence of ``kind``: ``what`` ("… cannot be written") and the reason."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {reason(error)}") from error


# --- writing -------------------------------------------------------------------------------------


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` so that a reader, or a crash, sees the old file or the new one, whole.

    A symbolic link in its place is replaced, too, not followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()  # of a killed process with this number, or a trap
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """``path`` for reading. Raises UserError for anything but a regular file, which may wait or never end."""
    with os_errors_said(f"{path} cannot be read"):
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a device may act on that
            raise UserError(f"{path} cannot be read: it is no regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # should it be a FIFO by now
        with open(descriptor, "rb") as file:
            yield file


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises UserError for anything else, or for more than ``max_bytes``."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path} cannot be read: it has more than {max_bytes // 2**20} MiB")
    return content


def lines_within(path: Path, limit: int) -> Iterator[bytes]:
    """The lines of a file of any size, without those of more than ``limit`` bytes. Raises UserError."""
    with open_regular(path) as file:
        while line := file.readline(limit):
            if line.endswith(b"\n") or len(line) < limit:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What the JSON file ``path`` holds.

    Raises UserError, with one sentence, where it is missing, no regular file, too large, nested deeper than
    ``MAX_DEPTH``, not UTF-8 or not JSON.
    """
    content = read_regular(path, max_bytes)
    with _damage_said(path):
        value = json.loads(content.decode())
        return within_limits(value)


def read_yaml(path: Path, max_bytes: int = MAX_YAML_BYTES) -> Any:
    """What the YAML file ``path`` holds, plain data only; None where it is empty.

    Raises UserError, with one sentence, where it is missing, no regular file, too large, nested deeper than
    ``MAX_DEPTH``, larger than ``MAX_YAML_NODES`` with its aliases replaced, not UTF-8 or not YAML.
    """
    content = read_regular(path, max_bytes)
    with _damage_said(path):
        loader = yaml.SafeLoader(content.decode())
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node)
            return within_limits(loader.construct_document(node))
        finally:
            loader.dispose()


@contextmanager
def _damage_said(path: Path) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise UserError(f"{path} is damaged: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{path} is damaged: not valid YAML{where} ({_short(problem)})") from error
    # JSONDecodeError, 5,000 digits, a date that does not exist; PyYAML's constructors are careless beside
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {_short(error) or type(error).__name__}") from error


def _short(message: object) -> str:
    return " ".join(str(message).split("\n")[0].split())[:200]


def within_limits(content: Any) -> Any:
    """``content`` of JSON or YAML, which can now be walked through recursively, and printed.

    Raises ValueError where it is nested deeper than ``MAX_DEPTH``, or holds more than ``MAX_VALUES`` values
    or an integer that is no number of anything.
    """
    level, number = [content], 0
    for _ in range(MAX_DEPTH):
        number += len(level)
        if number > MAX_VALUES:
            raise ValueError("it has too many values")
        if any(isinstance(item, int) and abs(item) > MAX_INTEGER for item in level):
            raise ValueError("it holds an integer of too many digits")
        level = [item for outer in level for item in _items(outer)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def _items(outer: Any) -> Iterator[Any]:
    if isinstance(outer, Mapping):
        yield from outer.keys()
        yield from outer.values()
    elif isinstance(outer, list | tuple | set):
        yield from outer


def _check_node(root: yaml.Node) -> None:
    """Raises ValueError where the YAML below ``root`` is too large or too deep, or contains itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        known = sizes.get(id(node))
        if known == 0:
            raise ValueError("it contains itself")
        if known is not None:
            return known
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        sizes[id(node)] = 0  # on the way
        total = 1
        if isinstance(node, yaml.ScalarNode):
            if node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_YAML_SCALAR:
                raise ValueError(f"a value of {len(node.value)} characters is no number")
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(part, depth + 1) for pair in node.value for part in pair)
        else:
            total += sum(size(part, depth + 1) for part in node.value)
        if total > MAX_YAML_NODES:
            raise ValueError("it has too many values")
        sizes[id(node)] = total
        return total

    size(root, 1)
