"""What a checkpoint says in JSON: the trainer's record, and the evaluation that followed it.

A checkpoint is begun before the evaluation of its step, so that a run that is killed in the evaluation has
it. ``evaluation.json`` comes later: what it says takes the place of what ``trainer.json`` says.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsotrain.errors import UserError
from rsotrain.files import finite, read_json, write_json_atomic

RECORD = "trainer.json"
EVALUATION = "evaluation.json"
_LARGEST = 2**63  # what others can compute with


class DamagedError(ValueError):
    """A checkpoint is not as it was written; the message says how."""


def load_record(path: Path) -> dict[str, Any]:
    """The record of one checkpoint folder, its evaluation in it.

    Raises DamagedError, or UserError if the file cannot be read.
    """
    record = read_json(path / RECORD)
    if not isinstance(record, dict) or not _is_count(record.get("step")):
        raise DamagedError(f"{RECORD} is damaged")
    if not _is_number(record.get("adapter_alpha", 1.0)):
        raise DamagedError(f"{RECORD} is damaged")
    evaluation = _evaluation(path)
    if evaluation is None:
        return record
    return record | {"score": evaluation["score"], "run": record.get("run", {}) | evaluation["run"]}


def check_record(record: Mapping[str, Any]) -> None:
    """Raises DamagedError where what a run needs to go on is missing or of another type."""
    run, number, norms = record.get("run"), int | float, record.get("gradient_norms", [])
    right = (
        _is_count(record.get("step"))
        and _is_count(record.get("tokens"))
        and isinstance(record.get("data", {}), dict)
        and (record.get("lr") is None or _is_number(record["lr"]))
        and _is_count(record.get("bad_steps", 0))
        and isinstance(norms, list)
        and all(map(_is_number, norms))
        and isinstance(run, dict)
        and isinstance(run.get("data"), str)
        and isinstance(run.get("settings", {}), dict)
        and _is_number(run.get("seconds"))
        and _is_number(run.get("best_loss", 0.0))
        and _is_number(run.get("patience_best", 0.0))
        and _is_count(run.get("patience_waited", 0))
        and _holds(run.get("validation"), number | None)
        and _holds(run.get("record"), number | str | None)
    )
    if not right:
        raise DamagedError(f"{RECORD} is damaged: it lacks what a run needs to go on")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _LARGEST if isinstance(value, int) else not math.isnan(value)


def _holds(mapping: object, types: Any) -> bool:
    return isinstance(mapping, dict) and all(
        isinstance(value, types) and not (isinstance(value, int) and abs(value) >= _LARGEST)
        for value in mapping.values()
    )


def add_evaluation(path: Path, score: float, run: Mapping[str, Any]) -> None:
    """Say, in a checkpoint that is whole, what the evaluation of its step found.

    ``run``: what the run's own record says from now on. Raises OSError.
    """
    evaluation = finite({"score": score, "run": dict(run)})
    write_json_atomic(path / EVALUATION, {"evaluation": evaluation, "sha256": _digest(evaluation)})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _evaluation(path: Path) -> dict[str, Any] | None:
    """None where there is none that is whole: then the run evaluates again."""
    try:
        content = read_json(path / EVALUATION)
        evaluation = content["evaluation"]
        whole = content["sha256"] == _digest(evaluation) and isinstance(evaluation["run"], dict)
    except (UserError, LookupError, TypeError):
        return None
    return evaluation if whole and "score" in evaluation else None


def score(path: Path) -> float:
    """The validation loss of a checkpoint; infinite where it is not known."""
    try:
        found = load_record(path).get("score")
    except (UserError, DamagedError):
        found = None
    return found if _is_number(found) and math.isfinite(found) else math.inf  # type: ignore[arg-type, return-value]
