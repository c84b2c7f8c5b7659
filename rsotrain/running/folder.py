"""A run is a folder with a deterministic name: the same command again resumes it."""

import dataclasses
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from rsotrain.config.identity import differences, identity, identity_of, run_folder_path
from rsotrain.config.keys import plain
from rsotrain.config.schema import Config
from rsotrain.errors import Interrupted, StoppedEarly, UserError, require
from rsotrain.files import read_json, read_yaml, write_atomic, write_json_atomic
from rsotrain.tracking.run_files import CONFIG, METRICS, RUN_RECORD, SUMMARY, RunState


@dataclasses.dataclass(frozen=True)
class RunFolder:
    path: Path
    run_id: str  # stable over restarts; W&B's id

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / SUMMARY

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that reached its last step, else None."""
        summary = _read_json(self.summary)
        return summary if summary.get("finished") else None

    def record(self, **facts: str | int) -> None:
        """Add ``facts`` to ``run.json``, what others may know of the run."""
        file = self.path / RUN_RECORD
        write_json_atomic(file, _read_json(file) | facts)


def _clear(path: Path) -> None:
    """Forget an earlier run in ``path``, and nothing else that may lie there."""
    import shutil

    for name in ("checkpoints", "wandb"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (CONFIG, METRICS, SUMMARY, "train.log", RUN_RECORD):
        (path / name).unlink(missing_ok=True)


@contextmanager
def open_run_folder(config: Config, run_id: str | None = None) -> Iterator[RunFolder]:
    """Create or re-open the run's folder and hold its lock.

    Raises UserError if it cannot be written, if another process is at work in it, or if it holds a
    run with other settings and ``overwrite`` is not set.
    """
    path = run_folder_path(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")  # noqa: SIM115 (opened here for its error, closed below)
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is at work in {path}; give this one a run_name") from error
        if config.overwrite:
            _clear(path)
        _settle_config(config, path)
        known = _read_json(path / RUN_RECORD).get("run_id")
        folder = RunFolder(path, run_id or known or secrets.token_hex(6))
        if folder.finished_summary() is not None:
            yield folder
            return
        with _recording_state(folder):
            yield folder


@contextmanager
def _recording_state(folder: RunFolder) -> Iterator[None]:
    """Keep the run's state, and where it runs, in ``run.json``."""
    state = RunState.failed
    folder.record(
        run_id=folder.run_id, state=RunState.running.value, host=socket.gethostname(), pid=os.getpid()
    )
    try:
        yield
        state = RunState.finished
    except (StoppedEarly, Interrupted):
        state = RunState.stopped
        raise
    finally:
        with suppress(OSError):  # a full disk has been reported, or the error that ends the run is on its way
            folder.record(state=state.value)


def _settle_config(config: Config, path: Path) -> None:
    file = path / CONFIG
    # A start that was refused, or ended before its first step, leaves nothing to protect.
    if file.is_file() and any((path / name).exists() for name in ("checkpoints", METRICS)):
        try:
            saved = read_yaml(file)
            require(isinstance(saved, dict), f"{file} is damaged: it holds no settings")
        except UserError as error:
            raise UserError(
                f"{error}; so the run there cannot be compared with these settings:"
                " choose another run_name, or overwrite=true to discard it"
            ) from error
        if differing := differences(identity_of(saved, config), identity(config)):
            raise UserError(
                f"{path} holds a run with other settings ({differing});"
                " choose another run_name, or overwrite=true to discard it"
            )
    write_atomic(file, yaml.safe_dump(plain(config), sort_keys=False))


def _read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty if the file is missing or damaged."""
    try:
        content = read_json(file)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
