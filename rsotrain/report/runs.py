"""Run folders, and W&B's offline folders, as what a report needs of them."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rsotrain.config.identity import completed
from rsotrain.errors import INTERRUPTED_STATUS, UserError
from rsotrain.report.wandb_offline import OfflineRun, is_offline_folder, read_offline_runs
from rsotrain.tracking.escaping import print_line
from rsotrain.tracking.run_files import CONFIG, METRICS, RUN_RECORD, SUMMARY, RunState

SILENCE_SECONDS = 600.0  # a run on another machine that logs nothing for so long counts as lost


@dataclass(frozen=True)
class Run:
    """``history``: metrics.jsonl's records by step; ``config``: dotted key -> value."""

    path: Path
    name: str
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    state: RunState
    data_fingerprint: str | None = None

    @property
    def finished(self) -> bool:
        return self.state is RunState.finished

    @property
    def step(self) -> int:
        return int(self.last("step") or 0)

    @property
    def steps(self) -> int:
        """How many it is to do; what it has done where the configuration does not say."""
        return int(_number(self.config.get("steps")) or self.step)

    def last(self, metric: str) -> float | None:
        """What ``summary.json`` says, else the latest; None: never logged, or not a finite number then."""
        return _number(self.summary[metric]) if metric in self.summary else self.latest(metric)

    def latest(self, metric: str) -> float | None:
        """The value in the last record that has the metric; a diverged run has no figure, not an old one."""
        return next((_number(r[metric]) for r in reversed(self.history) if metric in r), None)

    def series(self, metric: str) -> list[tuple[float, float, float, float]]:
        """(step, tokens, seconds, value) of each record that has the metric."""
        points = []
        for record in self.history:
            value = _number(record.get(metric))
            x = [_number(record.get(key)) for key in ("step", "tokens", "time")]
            if value is not None and None not in x:
                points.append((*x, value))
        return points  # type: ignore[return-value]


def _number(value: object) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in ``paths``: run folders, folders of run folders, or W&B's offline folders.

    A folder that is named must be, or hold, a run; run folders in a folder that is named are left out
    while they have no metrics. Several W&B folders of one id are one run. Raises UserError.
    """
    runs: list[Run] = []
    offline: list[Path] = []
    named = list(dict.fromkeys(p.expanduser().resolve() for p in paths))
    for path in named:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give run folders, or the folder that holds them")
        if is_offline_folder(path):
            offline.append(path)
        elif is_run_folder(path):
            runs.append(read_run(path))
        elif inner := [p for p in sorted(path.iterdir()) if p.is_dir()]:
            found = [read_run(p) for p in inner if is_run_folder(p) and has_metrics(p)]
            folders = [p for p in inner if is_offline_folder(p)]
            if not found and not folders:
                raise UserError(
                    f"{path} holds no run with metrics; give run folders, or the folder that holds them"
                )
            runs += found
            offline += folders
        else:
            raise UserError(f"{path} is not a run folder: it has no {CONFIG}")
    for record in read_offline_runs(offline):
        if record.history:
            state = _state_of_offline(record)
            config = completed(record.config)
            runs.append(Run(record.path, record.name, config, record.history, record.summary, state))
        elif record.path in named:
            raise UserError(f"{record.path} has no metrics: its run has not got to the first step")
    if not runs:
        raise UserError(
            f"{paths[0]} holds no run with metrics; give run folders, or the folder that holds them"
        )
    return _unique(runs)


def read_neighbours(folders: Sequence[Path]) -> list[Run]:
    """The other runs in the folders that hold ``folders``; of one that cannot be read it says why."""
    known = {folder.resolve() for folder in folders}
    runs = []
    for parent in sorted({folder.parent for folder in known}):
        for path in sorted(parent.iterdir()):
            if path not in known and is_run_folder(path) and has_metrics(path):
                try:
                    runs.append(read_run(path))
                except UserError as error:
                    print_line(f"left out of the report: {error}", sys.stderr)
    return runs


def looks(paths: Sequence[Path], every: float) -> Iterator[tuple[list[Run], bool]]:
    """The runs in ``paths`` and whether to look again, each ``every`` seconds, until none of them goes on.

    Between two members of a sweep nothing runs for a moment, and a run has no metrics before its first
    step: the end is believed when it is seen twice. Raises UserError.
    """
    went = False
    while True:
        runs = read_runs(paths)
        goes = any(run.state is RunState.running for run in runs) or _is_starting(paths)
        yield runs, goes or went
        if not (goes or went):
            return
        went = goes
        time.sleep(every)


def _is_starting(paths: Sequence[Path]) -> bool:
    """Whether a run in ``paths`` has begun and not got to its first step."""
    folders = [folder for path in paths for folder in (path, *path.expanduser().glob("*/"))]
    records = [f / RUN_RECORD for f in folders if (f / RUN_RECORD).is_file() and not has_metrics(f)]
    return any(_state(_read_json(record), {}, record) is RunState.running for record in records)


def is_run_folder(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / METRICS).is_file()


def has_metrics(path: Path) -> bool:
    return (path / METRICS).is_file() and (path / METRICS).stat().st_size > 0


def read_run(path: Path) -> Run:
    """The run in one folder. Raises UserError if it has no metrics or no readable configuration."""
    if not has_metrics(path):
        raise UserError(f"{path} has no metrics: its run has not got to the first step (see its train.log)")
    try:
        config = yaml.safe_load((path / CONFIG).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path / CONFIG} cannot be read, so nobody knows what was run there: {reason}"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} is not the configuration of a run")
    history = read_history(path / METRICS)
    if not history:
        raise UserError(f"{path / METRICS} holds no record that can be read")
    record = _read_json(path / RUN_RECORD)
    summary = _read_json(path / SUMMARY)
    fingerprint = record.get("data")
    return Run(
        path=path,
        name=path.name,
        config=completed(config),
        history=history,
        summary=summary,
        state=_state(record, summary, path / METRICS),
        data_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; lines torn by a kill, or still being written, are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _state(record: Mapping[str, Any], summary: Mapping[str, Any], metrics: Path) -> RunState:
    if summary.get("finished"):
        return RunState.finished
    try:
        state = RunState(record.get("state"))
    except ValueError:  # a folder without the record
        state = RunState.running
    if state is not RunState.running:
        return RunState.stopped if state is RunState.finished else state
    if record.get("host") == socket.gethostname() and isinstance(record.get("pid"), int):
        return RunState.running if _is_alive(record["pid"]) else RunState.lost
    return _running_or_lost(metrics)


def _state_of_offline(run: OfflineRun) -> RunState:
    ended = {0: RunState.finished, INTERRUPTED_STATUS: RunState.stopped, None: None}
    return ended.get(run.exit_code, RunState.failed) or _running_or_lost(next(run.path.glob("run-*.wandb")))


def _running_or_lost(log: Path) -> RunState:
    return RunState.running if time.time() - log.stat().st_mtime < SILENCE_SECONDS else RunState.lost


def _is_alive(pid: int) -> bool:
    if pid <= 0:  # means other processes than one
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Without those that were named twice, as themselves and through the folder that holds them."""
    return list({run.path: run for run in runs}.values())
