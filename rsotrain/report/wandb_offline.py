"""W&B's offline folders, read back through the reader that wandb ships."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsotrain.errors import UserError
from rsotrain.files import within_limits
from rsotrain.report.records import MAX_METRICS_BYTES, is_step, size_of

PREFIXES = ("offline-run-", "run-")  # W&B's names of the folders of offline and online runs
OWN_KEYS = "_"  # W&B's own columns and settings begin with it
TIMEOUT_SECONDS = 300.0


@dataclass
class OfflineRun:
    """What one W&B run id has recorded, over all its starts.

    ``path``: the folder of the last one; ``exit_code``: None if it did not end.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def is_offline_folder(path: Path) -> bool:
    return path.name.startswith(PREFIXES) and bool(_logs(path))


def _logs(folder: Path) -> list[Path]:
    try:
        return sorted(log for log in folder.glob("run-*.wandb") if os.path.isfile(log))
    except OSError:
        return []


def log_of(folder: Path) -> Path:
    """The file that W&B has written there. Raises UserError where there is none, or several."""
    logs = _logs(folder)
    if len(logs) != 1:
        raise UserError(f"{folder} holds {len(logs)} files of W&B's, not one")
    return logs[0]


def read_offline_runs(folders: Sequence[Path]) -> tuple[list[OfflineRun], dict[Path, str]]:
    """One run for each id, and of each folder that cannot be read why not.

    A restart has a folder of its own; its records replace those of the others from its first step on.
    """
    runs: dict[str, OfflineRun] = {}
    damaged: dict[Path, str] = {}
    for folder in sorted(folders, key=lambda p: p.name):  # the names hold the time
        try:
            log = log_of(folder)
            records = list(_records(log))
        except UserError as error:
            damaged[folder] = str(error)
            continue
        run_id = log.stem.removeprefix("run-")
        run = runs.setdefault(run_id, OfflineRun(folder, run_id))
        history: list[dict[str, Any]] = []
        run.path, run.exit_code = folder, None
        for record in records:
            match record:
                case {"type": "run", "run": {**content}}:
                    name = content.get("display_name")
                    run.name = name if isinstance(name, str) and name else run.name
                    run.config |= _without_own(_object(_object(content.get("config")).get("update")))
                case {"type": "history", "history": {"item": {"step": step} as item}} if is_step(step):
                    history.append(_without_own(item))
                case {"type": "summary", "summary": {"update": update}}:
                    run.summary |= _without_own(_object(update))
                case {"type": "exit", "exit": {**content}}:
                    code = content.get("exit_code", 0)
                    run.exit_code = code if isinstance(code, int) else 1
        if history:
            run.history = [r for r in run.history if r["step"] < history[0]["step"]] + history
    return list(runs.values()), damaged


def _records(log: Path) -> Iterator[object]:
    """What wandb's own reader makes of a file; records that are no JSON are left out. Raises UserError."""
    if size_of(log) > MAX_METRICS_BYTES:
        raise UserError(f"{log} cannot be read: it has more than {MAX_METRICS_BYTES:,} bytes")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log.parent)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{log} cannot be read: `wandb leet inspect` does not come to an end") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise UserError(f"{log.parent} cannot be read by `wandb leet inspect`: {lines[-1]}")
    for line in done.stdout.splitlines():
        try:
            yield json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            continue


def _object(value: object) -> dict[str, Any]:
    """``value`` if it is an object that can be walked through, else an empty one."""
    try:
        return within_limits(value) if isinstance(value, dict) else {}
    except ValueError:
        return {}


def _without_own(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if not key.startswith(OWN_KEYS)}
