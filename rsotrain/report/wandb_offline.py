"""W&B's offline folders, read back through the reader that wandb ships."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsotrain.errors import UserError

PREFIXES = ("offline-run-", "run-")  # W&B's names of the folders of offline and online runs
OWN_KEYS = "_"  # W&B's own columns and settings begin with it


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
    return path.name.startswith(PREFIXES) and any(path.glob("run-*.wandb"))


def read_offline_runs(folders: Sequence[Path]) -> list[OfflineRun]:
    """One run for each id.

    A restart has a folder of its own; its records replace those of the others from its first step on.
    Raises UserError for a folder that cannot be read.
    """
    runs: dict[str, OfflineRun] = {}
    for folder in sorted(folders, key=lambda p: p.name):  # the names hold the time
        (log,) = folder.glob("run-*.wandb")
        run_id = log.stem.removeprefix("run-")
        run = runs.setdefault(run_id, OfflineRun(folder, run_id))
        history: list[dict[str, Any]] = []
        run.path, run.exit_code = folder, None
        for record in _records(folder):
            match record:
                case {"type": "run", "run": content}:
                    run.name = content.get("display_name") or run.name
                    run.config |= _without_own(content.get("config", {}).get("update", {}))
                case {"type": "history", "history": {"item": item}} if isinstance(item.get("step"), int):
                    history.append(_without_own(item))
                case {"type": "summary", "summary": {"update": update}}:
                    run.summary |= _without_own(update)
                case {"type": "exit", "exit": content}:
                    run.exit_code = content.get("exit_code", 0)
        if history:
            run.history = [r for r in run.history if r["step"] < history[0]["step"]] + history
    return list(runs.values())


def _records(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"{folder} cannot be read by `wandb leet inspect`: {lines[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _without_own(mapping: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if not key.startswith(OWN_KEYS)}
