"""Weights & Biases, kept at arm's length: it can be slow, broken or absent, and training does not notice."""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from rsotrain.config.schema import WandbMode
from rsotrain.tracking.wandb_environment import DEFAULT_PROJECT, own_arguments, own_settings


class Table(NamedTuple):
    """Texts in rows and columns, the value of a record's key."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class WandbLogger:
    """One W&B run, owned by a daemon thread that the training thread feeds through a bounded queue.

    The thread imports wandb, starts the run, logs and finishes it; ``log`` only appends to the queue and
    never waits or raises. Online needs an API key (environment, netrc or wandb's settings); without one,
    or when the server cannot be reached, refuses the key or takes longer than ``init_timeout_seconds``,
    the run is recorded offline. Anything that goes wrong is one call of ``warn``, possibly from the
    thread. ``close`` waits at most ``close_timeout_seconds``.

    What is None is for W&B to find in the environment, or in the files of `wandb init`; so are the folder,
    and the name unless the run ``is_named``. The run's id is ``run_id`` and it may be resumed; within a sweep
    W&B's own id and project are used. The stop button of W&B's page acts like Ctrl-C.
    """

    def __init__(
        self,
        *,
        mode: WandbMode,
        run_dir: Path,
        run_id: str,
        run_name: str,
        is_named: bool = False,
        flat_config: Mapping[str, object],
        warn: Callable[[str], None],
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        init_timeout_seconds: float = 30.0,
        close_timeout_seconds: float = 30.0,
        max_queued: int = 10_000,
    ) -> None:
        self.place: Path | str | None = None  # the run's page, or its offline folder, once it has started
        self._mode = mode
        self._init_timeout_seconds = init_timeout_seconds
        self._close_timeout_seconds = close_timeout_seconds
        self._arguments: dict[str, Any] = {
            "id": run_id,
            "project": project,
            "entity": entity,
            "group": group,
            "tags": None if tags is None else list(tags),
            "config": dict(flat_config),
            "reinit": "create_new",  # never another run of this process
            **own_arguments(str(run_dir), run_name),
            **({"name": run_name} if is_named else {}),
        }
        self._folder = self._arguments.get("dir") or os.environ["WANDB_DIR"]
        self._warn = warn
        self._max_queued = max_queued
        # Unbounded, so that the closing None always fits; log() keeps the bound.
        self._queue: SimpleQueue[tuple[dict[str, Any], int] | None] = SimpleQueue()
        self._num_dropped = 0
        self._failed = False
        self._abandoned = False  # close() has given up: say and tear down nothing any more
        self._summary: dict[str, object] = {}
        self._exit_code = 0
        self._preempted = False
        self._thread = threading.Thread(target=self._work, name="wandb-logger", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, float | int | str | Table], step: int) -> None:
        """Queue one record; a full queue drops it (one warning, the count at ``close``)."""
        if self._failed:
            return
        if self._queue.qsize() < self._max_queued:
            self._queue.put(({**record, "step": step}, step))
            return
        self._num_dropped += 1
        if self._num_dropped == 1:
            self._warn(
                f"W&B is slower than training: {self._max_queued} records wait for it, "
                "and more are dropped (metrics.jsonl has them all)."
            )

    def preempted(self) -> None:
        """The run is about to end because its machine is taken away; a sweep starts it again elsewhere."""
        self._preempted = True

    def close(self, summary: Mapping[str, object], exit_code: int) -> None:
        """Hand over the summary and wait, for a bounded time, until W&B has everything."""
        self._summary = {key: _plain(value) for key, value in summary.items()}
        self._exit_code = exit_code
        self._queue.put(None)
        self._thread.join(self._close_timeout_seconds)
        if self._thread.is_alive() and not self._failed:
            self._abandoned = True
            self._warn(
                f"W&B had not finished {self._close_timeout_seconds:g} s after the end of the run and is "
                f"left alone; `wandb sync` sends what is in {self._folder}/wandb."
            )
        if self._num_dropped:
            self._warn(f"W&B missed {self._num_dropped} records (metrics.jsonl has them all).")

    def _work(self) -> None:
        try:
            with _exit_hooks_kept():
                import wandb

                run = self._start(wandb)
            for record, step in iter(self._queue.get, None):
                content = {key: _logged(wandb, value) for key, value in record.items()}
                # who else writes to a shared run is at another step
                run.log(content, step=None if self._mode is WandbMode.shared else step)
            run.summary.update(self._summary)
            if self._preempted:
                run.mark_preempting()
            self._finish(run)
            if not self._abandoned:  # a later run of this process may use the service by then
                wandb.teardown()
        except BaseException as error:  # wandb raises SystemExit, too
            self._failed = True
            if not self._abandoned:
                self._warn(f"W&B failed and is off for the rest of the run ({_first_line(error)}).")
                _drop_service()

    def _start(self, wandb: Any) -> Any:
        self._setup(wandb)
        problem = None
        if self._mode is not WandbMode.offline:
            try:
                if wandb.login(verify=False, prompt=False):
                    run = self._init(wandb, "shared" if self._mode is WandbMode.shared else "online")
                    self.place = run.url
                    return run
                if self._mode is not WandbMode.auto:
                    problem = "no API key: `wandb login` stores one"
            except Exception as error:
                if self._abandoned:
                    raise
                problem = _first_line(error)
                _drop_service()  # it still holds the run's id
                self._setup(wandb)
        run = self._init(wandb, "offline")
        self.place = Path(run.dir).parent
        if problem is not None:
            self._warn(f"W&B is not reachable ({problem}); the run is recorded offline in {self.place}.")
        return run

    def _setup(self, wandb: Any) -> None:
        """Read what the environment and W&B's own files say, and decide on what they leave open."""
        found = wandb.setup(wandb.Settings(silent=True)).settings
        self._arguments["project"] = self._arguments["project"] or found.project or DEFAULT_PROJECT

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = wandb.Settings(
            **own_settings(),
            x_save_requirements=False,
            init_timeout=self._init_timeout_seconds,
            # The service gives up a little before close() does.
            finish_timeout=0.8 * self._close_timeout_seconds,
            finish_timeout_raises=True,
        )
        run = wandb.init(mode=mode, settings=settings, **self._arguments)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _finish(self, run: Any) -> None:
        try:
            run.finish(exit_code=self._exit_code)
        except TimeoutError:
            if not self._abandoned:
                self._warn(
                    f"W&B did not take all records within {0.8 * self._close_timeout_seconds:g} s of the end "
                    f"of the run; `wandb sync {Path(run.dir).parent}` sends the rest."
                )


@contextmanager
def _exit_hooks_kept() -> Iterator[None]:
    """Let wandb start without taking over how this process ends.

    It replaces sys.exit and sys.excepthook and registers an exit handler that waits for its uploads;
    its telemetry registers more. ``close`` ends the run; a process that dies before it leaves the
    service to notice that by itself, as after SIGKILL.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    hooks = {name: getattr(sys, name) for name in ("exit", "excepthook")}
    register = atexit.register

    def register_others(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return function if _is_wandb(function) else register(function, *args, **kwargs)

    setattr(atexit, "register", register_others)  # noqa: B010 (mypy refuses the plain assignment)
    try:
        yield
    finally:
        setattr(atexit, "register", register)  # noqa: B010
        for name, hook in hooks.items():
            if _is_wandb(getattr(sys, name)):
                setattr(sys, name, hook)


def _drop_service() -> None:
    """Leave a service in doubt behind, so that the next run of this process starts its own."""
    if "wandb" in sys.modules:
        with suppress(BaseException):  # its failure has been reported; tearing down may fail again
            sys.modules["wandb"].teardown()
    os.environ.pop("WANDB_SERVICE", None)  # may be a sweep agent's


def _is_wandb(function: object) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] == "wandb"


def _logged(wandb: Any, value: object) -> object:
    if isinstance(value, Table):
        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    return value


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
