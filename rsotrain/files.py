"""Files that are written whole or not at all, and what JSON can hold, be it damaged."""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def read_json_object(path: Path, largest_bytes: int = 64 * 2**20) -> dict[str, Any]:
    """The object in a JSON file that somebody else has written.

    Raises OSError where it cannot be read, and ValueError, with a message of one line, where it is no
    regular file, too large, or not a JSON object: text cut off, nested without end, numbers of thousands of
    digits.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device might never end
        raise ValueError("it is not a regular file")
    if found.st_size > largest_bytes:
        raise ValueError(f"it has {found.st_size} bytes, more than the {largest_bytes} that are read")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
