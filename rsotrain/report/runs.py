"""Run folders, and W&B's offline folders, as what a report needs of them."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsotrain.config.identity import completed
from rsotrain.errors import INTERRUPTED_STATUS, UserError
from rsotrain.files import read_json, read_yaml
from rsotrain.report.records import figure_of, number_of, read_history, size_of
from rsotrain.report.wandb_offline import OfflineRun, is_offline_folder, log_of, read_offline_runs
from rsotrain.tracking.run_files import CONFIG, METRICS, RUN_RECORD, SUMMARY, RunState

SILENCE_SECONDS = 600.0  # a run on another machine that logs nothing for so long counts as lost

Tell = Callable[[str], None]


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
        return int(number_of(self.config.get("steps")) or self.step)

    def last(self, metric: str) -> float | None:
        """What ``summary.json`` says, else the latest; None: never logged, or not a finite number then."""
        return figure_of(metric, self.summary[metric]) if metric in self.summary else self.latest(metric)

    def latest(self, metric: str) -> float | None:
        """The value in the last record that has the metric; a diverged run has no figure, not an old one."""
        return next((figure_of(metric, r[metric]) for r in reversed(self.history) if metric in r), None)

    def series(self, metric: str) -> list[tuple[float, float, float, float]]:
        """(step, tokens, seconds, value) of each record that has the metric."""
        points = []
        for record in self.history:
            value = figure_of(metric, record.get(metric))
            x = [figure_of(key, record.get(key)) for key in ("step", "tokens", "time")]
            if value is not None and None not in x:
                points.append((*x, value))
        return points  # type: ignore[return-value]


def read_runs(paths: Sequence[Path], tell: Tell | None = None) -> list[Run]:
    """The runs in ``paths``: run folders, folders of run folders, or W&B's offline folders.

    A folder that is named must be, or hold, a run. Of those in a folder that is named, the ones without
    metrics are left out, and those that cannot be read, which ``tell`` is told. Several W&B folders of one
    id are one run. Raises UserError.
    """
    runs: list[Run] = []
    offline: list[Path] = []
    named = list(dict.fromkeys(map(_resolved, paths)))
    for path in named:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give run folders, or the folder that holds them")
        if is_offline_folder(path):
            offline.append(path)
        elif is_run_folder(path):
            runs.append(read_run(path))
        elif inner := folders_in(path):
            within = [p for p in inner if is_run_folder(p) and has_metrics(p)]
            found, damaged = _read_all(within)
            folders = [p for p in inner if is_offline_folder(p)]
            _tell_all(damaged, tell)
            if not found and not folders:
                if damaged:
                    raise UserError(damaged[0])
                raise UserError(
                    f"{path} holds no run with metrics; give run folders, or the folder that holds them"
                )
            runs += found
            offline += folders
        else:
            raise UserError(f"{path} is not a run folder: it has no {CONFIG}")
    for record in _read_offline(offline, named, tell):
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


def read_neighbours(folders: Sequence[Path], tell: Tell) -> list[Run]:
    """The other runs in the folders that hold ``folders``; ``tell`` is told which cannot be read, and why."""
    known = {folder.resolve() for folder in folders}
    runs, damaged = _read_all(
        path
        for parent in sorted({folder.parent for folder in known})
        for path in folders_in(parent)
        if path not in known and is_run_folder(path) and has_metrics(path)
    )
    _tell_all(damaged, tell)
    return runs


def _read_all(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and of each other one why not."""
    runs, damaged = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            damaged.append(str(error))
    return runs, damaged


def _read_offline(folders: Sequence[Path], named: Sequence[Path], tell: Tell | None) -> list[OfflineRun]:
    runs, damaged = read_offline_runs(folders)
    for folder, sentence in damaged.items():
        if folder in named:
            raise UserError(sentence)
        _tell_all([sentence], tell)
    return runs


def _tell_all(damaged: Sequence[str], tell: Tell | None) -> None:
    if tell is not None:
        for sentence in damaged:
            tell(f"left out: {sentence}")


def _resolved(path: Path) -> Path:
    try:
        path = path.expanduser().resolve()
        path.stat()
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a circle of links, a NUL
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return path


def folders_in(path: Path) -> list[Path]:
    """Sorted; those that may not be looked into are left out. Raises UserError."""
    try:
        return [entry for entry in sorted(path.iterdir()) if os.path.isdir(entry)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def is_run_folder(path: Path) -> bool:
    return os.path.isfile(path / CONFIG) or os.path.isfile(path / METRICS)


def has_metrics(path: Path) -> bool:
    return os.path.isfile(path / METRICS) and size_of(path / METRICS) > 0


def read_run(path: Path) -> Run:
    """The run in one folder. Raises UserError if it has no metrics or no readable configuration."""
    if not has_metrics(path):
        raise UserError(f"{path} has no metrics: its run has not got to the first step (see its train.log)")
    try:
        config = read_yaml(path / CONFIG)
    except UserError as error:
        raise UserError(f"{error}, so nobody knows what was run there") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} is not the configuration of a run")
    history = read_history(path / METRICS)
    if not history:
        raise UserError(f"{path / METRICS} holds no record that can be read")
    record = read_object(path / RUN_RECORD)
    summary = read_object(path / SUMMARY)
    fingerprint = record.get("data")
    return Run(
        path=path,
        name=path.name,
        config=completed(config),
        history=history,
        summary=summary,
        state=state_of(record, summary, path / METRICS),
        data_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def state_of(record: Mapping[str, Any], summary: Mapping[str, Any], metrics: Path) -> RunState:
    if summary.get("finished"):
        return RunState.finished
    try:
        state = RunState(record.get("state"))
    except ValueError:  # a folder without the record
        state = RunState.running
    if state is not RunState.running:
        return RunState.stopped if state is RunState.finished else state
    pid = record.get("pid")
    if record.get("host") == socket.gethostname() and isinstance(pid, int) and not isinstance(pid, bool):
        return RunState.running if _is_alive(pid) else RunState.lost
    return _running_or_lost(metrics)


def _state_of_offline(run: OfflineRun) -> RunState:
    ended = {0: RunState.finished, INTERRUPTED_STATUS: RunState.stopped, None: None}
    return ended.get(run.exit_code, RunState.failed) or _running_or_lost(log_of(run.path))


def _running_or_lost(log: Path) -> RunState:
    try:
        silent = time.time() - log.stat().st_mtime
    except OSError:
        return RunState.lost
    return RunState.running if silent < SILENCE_SECONDS else RunState.lost


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


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, as in the folder of a run that has just begun."""
    try:
        content = read_json(file)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Without those that were named twice, as themselves and through the folder that holds them."""
    return list({run.path: run for run in runs}.values())
