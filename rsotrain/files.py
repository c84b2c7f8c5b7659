"""Files that are written whole or not at all, and what JSON can hold."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


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
