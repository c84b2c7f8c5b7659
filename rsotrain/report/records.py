"""The records that a run has logged, as far as they can be trusted."""

import json
from pathlib import Path
from typing import Any

from rsotrain.errors import UserError
from rsotrain.files import lines_within

MAX_LINE_BYTES = 2**20  # of a record; ours have a few hundred
MAX_METRICS_BYTES = 2**30
MAX_TORN_LINES = 10_000  # each kill tears one
MAX_STEP = 10**15
COUNTED = ("step", "tokens", "time", "memory/", "throughput/")  # of which there cannot be less than none
LARGEST_FIGURE = 1e60  # what is beyond would overflow in a variance, and means nothing


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; lines torn by a kill, or still being written, are left out.

    Raises UserError for what is no metrics file.
    """
    if size_of(path) > MAX_METRICS_BYTES:
        raise UserError(f"{path} cannot be read: it has more than {MAX_METRICS_BYTES:,} bytes")
    records: list[dict[str, Any]] = []
    torn = 0
    for line in lines_within(path, MAX_LINE_BYTES):
        try:
            record = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and is_step(record.get("step")):
            records.append(record)
        elif (torn := torn + 1) > MAX_TORN_LINES:
            raise UserError(f"{path} cannot be read: more than {torn - 1:,} of its lines are no records")
    return records


def is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP


def number_of(value: object) -> float | None:
    """``value`` if it is a finite number that one can reckon with, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -LARGEST_FIGURE <= value <= LARGEST_FIGURE else None


def figure_of(metric: str, value: object) -> float | None:
    """``value`` if it is a number that ``metric`` can have."""
    number = number_of(value)
    return None if number is not None and number < 0 and metric.startswith(COUNTED) else number


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it has just been removed
        return 0
