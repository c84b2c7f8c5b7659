"""A run is a folder with a deterministic name: the same command again resumes it."""

import dataclasses
import errno
import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from rsotrain.config.identity import (
    as_before,
    differences,
    differing_settings,
    identity,
    identity_of,
    run_folder_path,
    run_name,
)
from rsotrain.config.keys import plain, with_values, without_keys
from rsotrain.config.schema import Config
from rsotrain.data.tokenizer import TOKENIZER_FOLDER
from rsotrain.errors import Interrupted, NonFiniteError, StoppedEarly, TrainingError, UserError, require
from rsotrain.files import os_errors_said, read_json, read_yaml, write_atomic, write_json_atomic
from rsotrain.running.owned import clear, forget_refused, refuse_links
from rsotrain.tracking.run_files import (
    CHECKPOINTS,
    CONFIG,
    DIVERGED,
    LOCK,
    LOG,
    METRICS,
    RUN_RECORD,
    SUMMARY,
    RunState,
)

_WANDB_ID = re.compile(r"[^/\\#?%:\x00-\x1f]{1,128}")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """``lock``: device and number of its lock file, by which it is known again. ``as_before``: dotted key ->
    value of what is otherwise than in the settings given, since the run began before there was a choice."""

    path: Path
    run_id: str  # stable over restarts; W&B's id
    lock: tuple[int, int]
    as_before: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def summary(self) -> Path:
        return self.path / SUMMARY

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def log(self) -> Path:
        return self.path / LOG

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that reached its last step, else None."""
        summary = _read_json(self.summary)
        return summary if summary.get("finished") else None

    def record(self, **facts: str | int | None) -> None:
        """Add ``facts`` to ``run.json``, what others may know of the run; None takes one out."""
        file = self.path / RUN_RECORD
        known = _read_json(file) | facts
        write_json_atomic(file, {key: value for key, value in known.items() if value is not None})

    def is_the_same(self) -> bool:
        """Is the folder at this path still the one that was opened?"""
        try:
            found = os.stat(self.path / LOCK, follow_symlinks=False)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.lock

    def check(self) -> None:
        """Raises TrainingError where the folder, or what every run has in it, is not there any more."""
        if not self.is_the_same():
            raise TrainingError(
                f"{self.path} was removed or replaced while the run was at work in it,"
                " so that nothing more can be kept: start it again"
            )
        for name in (CONFIG, METRICS, TOKENIZER_FOLDER):
            if not (self.path / name).exists():
                raise TrainingError(
                    f"{self.path / name} was removed while the run was at work; the same command writes it"
                    " again and goes on from the last checkpoint, without the metrics that were removed"
                )


@contextmanager
def open_run_folder(config: Config, run_id: str | None = None) -> Iterator[RunFolder]:
    """Create or re-open the run's folder and hold its lock.

    Raises UserError if it cannot be written, if another process is at work in it, if something in it is a
    link that leads out of it, or if it holds a run with other settings and ``overwrite`` is not set. Where a
    UserError or Ctrl-C ends the block before anything of value was written, a folder that this made is gone
    again.
    """
    path = run_folder_path(config)
    require(
        path.name not in ("", "..") and path.parent == Path(config.output_dir).expanduser(),
        f"the run's folder cannot be called {run_name(config)}: give it a run_name without a slash",
    )
    require(
        run_id is None or _WANDB_ID.fullmatch(run_id) is not None,
        f"WANDB_RUN_ID={run_id} is no id of W&B: at most 128 characters, none of them / \\ # ? % :",
    )
    made = [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
    with os_errors_said(f"output_dir={config.output_dir} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    older: dict[str, Any] = {}
    with lock:
        try:
            with os_errors_said(f"{path} cannot be written"):
                if config.overwrite:
                    clear(path)
                refuse_links(path)
                older = _settle_config(config, path)
            known = _read_json(path / RUN_RECORD).get("run_id")
            known = known if isinstance(known, str) and _WANDB_ID.fullmatch(known) else None
            status = os.fstat(lock.fileno())
            run_id = run_id or known or secrets.token_hex(6)
            folder = RunFolder(path, run_id, (status.st_dev, status.st_ino), older)
            if folder.finished_summary() is not None:
                yield folder
                return
            with _recording_state(folder):
                yield folder
        except (UserError, KeyboardInterrupt):
            with suppress(OSError):
                forget_refused(path, made)
            raise


def _lock(run: Path) -> IO[bytes]:
    """The lock file, opened and locked. Raises OSError, or UserError if another process holds it."""
    file = run / LOCK
    if not file.is_symlink() and file.exists() and not file.is_file():
        raise UserError(f"{file} is no file; take it away, or choose another run_name")
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(
            f"{file} is a symbolic link, and a run writes only inside its folder; take it away"
        ) from error
    lock = open(descriptor, "r+b")  # noqa: SIM115 (closed by the caller, or below)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise UserError(f"another process is at work in {run}; give this one a run_name") from error
    return lock


@contextmanager
def _recording_state(folder: RunFolder) -> Iterator[None]:
    """Keep the run's state, and where it runs, in ``run.json``."""
    state = RunState.failed
    with os_errors_said(f"{folder.path / RUN_RECORD} cannot be written"):
        folder.record(
            run_id=folder.run_id,
            state=RunState.running.value,
            host=socket.gethostname(),
            pid=os.getpid(),
            **{DIVERGED: None},
        )
    diverged = None
    try:
        yield
        state = RunState.finished
    except NonFiniteError:
        diverged = True
        raise
    except (StoppedEarly, Interrupted, KeyboardInterrupt):
        state = RunState.stopped
        raise
    finally:
        # a full disk has been reported, or the error that ends the run is on its way
        with suppress(OSError):
            if folder.is_the_same():
                folder.record(state=state.value, **{DIVERGED: diverged})


def _settle_config(config: Config, path: Path) -> dict[str, Any]:
    """Write ``config.yaml``; return what the run in the folder has otherwise than ``config``, as it is older.

    Such fields stay out of the file, so that the next start finds the run as old as it is.
    """
    file = path / CONFIG
    older: dict[str, Any] = {}
    # A start that was refused, or ended before its first step, leaves nothing to protect.
    if file.is_file() and any((path / name).exists() for name in (CHECKPOINTS, METRICS)):
        try:
            saved = read_yaml(file)
            require(isinstance(saved, dict), f"{file} is damaged: it holds no settings")
        except UserError as error:
            raise UserError(
                f"{error}; so the run there cannot be compared with these settings:"
                " choose another run_name, or overwrite=true to discard it"
            ) from error
        older = as_before(saved, config)
        as_it_began = with_values(config, older)
        if differing := differences(identity_of(saved, as_it_began), identity(as_it_began)):
            _refuse_other_steps(path, identity_of(saved, as_it_began), as_it_began)
            raise UserError(
                f"{path} holds a run with other settings ({differing});"
                " choose another run_name, or overwrite=true to discard it"
            )
    write_atomic(file, yaml.safe_dump(without_keys(plain(config), older), sort_keys=False))
    return older


def _refuse_other_steps(path: Path, saved: dict[str, Any], config: Config) -> None:
    """Raise UserError that says how to train on, where the number of steps is all that differs."""
    changed = differing_settings(saved, identity(config))
    if changed.keys() == {"steps"}:
        there, here = changed["steps"]
        raise UserError(
            f"{path} holds a run with steps={there}, on which its learning rates depend; to train it on, give"
            f" another run_name and checkpoint.path={path}: from the step that it has reached the rates are"
            f" then those of lr_scheduler={config.lr_scheduler.name} over steps={here}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty if the file is missing or damaged."""
    try:
        content = read_json(file)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
