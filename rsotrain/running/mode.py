"""``mode=train``: the folder, the display and the closing table around a run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.config.keys import with_values
from rsotrain.config.schema import Config
from rsotrain.errors import Interrupted, StoppedEarly, TrainingError
from rsotrain.files import os_errors_said, reason
from rsotrain.parallel.ranks import device_name, start
from rsotrain.running.epochs import with_steps
from rsotrain.running.folder import RunFolder, open_run_folder
from rsotrain.running.run import TrainingRun
from rsotrain.tracking.display import build_display, print_closing_table, shown_path
from rsotrain.tracking.escaping import print_line
from rsotrain.tracking.screen import survive_its_loss
from rsotrain.tracking.wandb_environment import init_timeout_seconds, resolve_mode
from rsotrain.training.composition import check_composition
from rsotrain.training.determinism import resume_in_words, settle
from rsotrain.training.guard import Guard, unguarded
from rsotrain.training.trial import try_plugged


def train(config: Config, guard: Guard = unguarded) -> dict[str, Any]:
    """Train to ``config.steps``, or for ``config.epochs``, or on from the newest checkpoint of the same run.

    Returns what ``summary.json`` holds. Raises TrainingError if the loss is not finite or the last
    checkpoint cannot be written; StoppedEarly after ``max_seconds`` and Interrupted after a signal, the
    checkpoint written.
    """
    survive_its_loss()
    settle(config.deterministic)
    world = start(config.parallelism, config.device)
    with (
        world.reporting_losses(),
        world.ending_together(StoppedEarly, Interrupted),
        ExitStack() as stack,
    ):
        config = with_steps(config, world)
        world.together(lambda: check_composition(config))
        untried = try_plugged(config, world)
        resolve_mode(config.logger)
        init_timeout_seconds(config.logger)

        def enter() -> tuple[RunFolder, dict[str, Any] | None]:
            folder = stack.enter_context(open_run_folder(config, os.environ.get("WANDB_RUN_ID") or None))
            return folder, folder.finished_summary()

        folder, summary = world.from_main(enter)  # rank 0 alone makes and locks it
        if summary is not None:
            if world.is_main:
                print_line(f"{folder.path} is finished already; overwrite=true runs it again")
                print_closing_table(summary, _files(folder))
            return summary
        config = with_values(config, folder.as_before)
        log_path = folder.log
        with os_errors_said(f"{log_path} cannot be written"):
            display = build_display(
                config.logger.progress, config.steps, log_path=log_path, silent=not world.is_main
            )
        where = device_name(world.device, world.size)
        display.message(f"run {folder.path.name} on {where}, precision={config.precision.name}")
        display.message(f"its folder: {shown_path(folder.path)}")
        display.message(resume_in_words(world.device, config.deterministic))
        if untried is not None:
            display.message(untried)
        for key, value in folder.as_before.items():
            display.message(
                f"the run in {folder.path} began before there was {key}, and goes on as it began,"
                f" with {key}={str(value).lower()}"
            )
        finished = False
        try:
            with guard(config, world), _os_errors_said():
                run = TrainingRun(config, folder, display, world)
                summary = run.run()
            finished = True
        finally:
            display.close(keep_bar=finished)
        if world.is_main:
            files = _files(folder)
            if (wandb := run.loggers.places().get("wandb")) is not None:
                files["wandb"] = wandb
            print_closing_table(summary, files, log_path)
        return summary


@contextmanager
def _os_errors_said() -> Iterator[None]:
    """For what the disk refuses where nobody else says so."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise TrainingError(
            f"{error.filename or 'a file'}: {reason(error)};"
            " the same command goes on from the last checkpoint"
        ) from error


def _files(folder: RunFolder) -> dict[str, Path | str]:
    """The run folder and what is in it."""
    files: dict[str, Path | str] = {"run folder": folder.path, "metrics": folder.metrics}
    if checkpoints := list_checkpoints(folder.checkpoints):
        files["checkpoint"] = checkpoints[-1]
    return files
