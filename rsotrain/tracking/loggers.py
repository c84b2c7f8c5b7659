"""Where the metrics of a run go: ``metrics.jsonl`` always, Weights & Biases when asked for.

Only rank 0 builds loggers. Record keys are metric names (``train/loss``, ``val/perplexity``, …) plus
``tokens`` and ``time``; every logger adds ``step``, the number of optimizer updates.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rsotrain.config.schema import LoggerConfig
from rsotrain.files import finite, write_atomic
from rsotrain.tracking.run_files import METRICS
from rsotrain.tracking.wandb_environment import init_timeout_seconds, resolve_mode
from rsotrain.tracking.wandb_logger import Table, WandbLogger

Record = Mapping[str, float | int | str]


class Logger(Protocol):
    def log(self, record: Record, step: int) -> None: ...

    def close(self, summary: Mapping[str, object], exit_code: int) -> None: ...


class JsonlLogger:
    """One JSON object a line, flushed per line, so that SIGKILL loses no line that was logged.

    NaN and infinities become null. ``resume_step=n`` keeps the lines of an earlier run up to step n and
    drops what comes after it (and a line torn by a kill), so that the history reads as that of one
    uninterrupted run; without ``evaluated`` the evaluation of step n is dropped, too, since it is to be
    repeated. None starts a new file. Raises TypeError for a value that JSON cannot hold. Lines that
    a full disk does not take are lost, which is said once, by ``warn``.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        warn: Callable[[str], None] = print,
        *,
        evaluated: bool = True,
    ) -> None:
        self.path = path
        self._warn = warn
        self._warned = False
        if resume_step is None:
            path.write_text("")
        else:
            _keep_lines(path, resume_step, evaluated)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open until close)

    def log(self, record: Record, step: int) -> None:
        line = json.dumps(finite({"step": step, **record}), allow_nan=False) + "\n"
        with self._surviving():
            self._file.write(line)
            self._file.flush()

    def close(self, summary: Mapping[str, object], exit_code: int) -> None:
        with self._surviving():
            self._file.close()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warn(f"warning: {self.path.name} cannot be written: {error.strerror or error}")
            self._warned = True


def _keep_lines(path: Path, step: int, evaluated: bool) -> None:
    """Rewrite a metrics file without the lines beyond ``step`` and without lines that are not records."""
    if not path.exists():
        path.write_text("")
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    write_atomic(
        path, "".join(line for line in lines if line.endswith("\n") and _stays(line, step, evaluated))
    )


def _stays(line: str, last: int, evaluated: bool) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(step, int):
        return False
    return step < last or (step == last and (evaluated or "val/loss" not in record))


class Loggers:
    """Hands every record to all loggers, in order."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, record: Record, step: int) -> None:
        for logger in self.loggers:
            logger.log(record, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Hand a table of texts to those loggers that show tables: W&B."""
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.log({name: Table(columns, rows)}, step)

    def preempted(self) -> None:
        """Tell W&B, before ``close``, that the run ends because its machine is taken away."""
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.preempted()

    def close(self, summary: Mapping[str, object], exit_code: int) -> None:
        """Close all, even when one fails; the first failure is raised at the end."""
        failure: Exception | None = None
        for logger in self.loggers:
            try:
                logger.close(summary, exit_code)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def places(self) -> dict[str, Path | str]:
        """Where the records are, for the closing table: a path, or a W&B page."""
        places: dict[str, Path | str] = {}
        for logger in self.loggers:
            if isinstance(logger, JsonlLogger):
                places["metrics"] = logger.path
            elif isinstance(logger, WandbLogger) and logger.place is not None:
                places["wandb"] = logger.place
        return places


def build_loggers(
    config: LoggerConfig,
    *,
    run_dir: Path,
    run_id: str,
    run_name: str,
    is_named: bool = False,
    flat_config: Mapping[str, object],
    resume_step: int | None,
    warn: Callable[[str], None],
    evaluated: bool = True,
) -> Loggers:
    """The loggers of one run, whose files go into ``run_dir`` (which exists).

    ``flat_config`` has dotted keys (``optimizer.lr``): a W&B sweep over a group name would replace a
    nested dictionary. ``is_named``: by the user, so that ``WANDB_NAME`` does not count. ``warn`` is called
    from another thread, too. Raises UserError for a ``WANDB_MODE`` or ``WANDB_INIT_TIMEOUT`` that makes no
    sense.
    """
    loggers: list[Logger] = [JsonlLogger(run_dir / METRICS, resume_step, warn, evaluated=evaluated)]
    mode = resolve_mode(config)
    if mode is not None:
        init_timeout = init_timeout_seconds(config)
        wandb_logger = WandbLogger(
            mode=mode,
            run_dir=run_dir,
            run_id=run_id,
            run_name=run_name,
            is_named=is_named,
            project=config.wandb_project,
            entity=config.wandb_entity,
            group=config.wandb_group,
            tags=config.wandb_tags,
            flat_config=flat_config,
            init_timeout_seconds=init_timeout,
            # a run that ends while the server is still being waited for has time to go offline
            close_timeout_seconds=init_timeout + 10.0,
            warn=warn,
        )
        loggers.append(wandb_logger)
    return Loggers(loggers)
