"""One run from its configuration to its files: what surrounds the training loop."""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.checkpoints.saving import BackgroundSaver
from rsotrain.config.identity import cache_dir, identity
from rsotrain.config.keys import flatten, plain
from rsotrain.config.methods import SubspaceConfig
from rsotrain.config.schema import Config
from rsotrain.data.build import build_data
from rsotrain.data.tokenizer import save_tokenizer
from rsotrain.data.unigram import unigram_loss
from rsotrain.errors import (
    INTERRUPTED_STATUS,
    Interrupted,
    StoppedEarly,
    TrainingError,
)
from rsotrain.escaping import print_line
from rsotrain.files import finite, write_json_atomic
from rsotrain.instruments.memory import memory_metrics
from rsotrain.models.build import COMPUTE_DTYPE
from rsotrain.parallel.ranks import World, start
from rsotrain.running.folder import RunFolder, open_run_folder
from rsotrain.running.interrupt import SCHEDULERS_WARNINGS, Reason, StopRequest, agreed_reason
from rsotrain.running.resume import Progress, resume
from rsotrain.tracking.display import Display, build_display, print_closing_table, print_parameter_table
from rsotrain.tracking.loggers import Loggers, build_loggers
from rsotrain.tracking.metrics import StepTimer, forget_peak_memory, peak_memory_bytes
from rsotrain.tracking.wandb_environment import init_timeout_seconds, resolve_mode
from rsotrain.training.evaluation import perplexity
from rsotrain.training.flops import matmul_flops_per_second
from rsotrain.training.guard import Guard, unguarded
from rsotrain.training.trainer import NonFiniteError, StepResult, Trainer, check_composition, share_of_batch


def train(config: Config, guard: Guard = unguarded) -> dict[str, Any]:
    """Train to ``config.steps``, or on from the newest checkpoint of the same run.

    Returns what ``summary.json`` holds. Raises TrainingError if the loss is not finite or the last
    checkpoint cannot be written; StoppedEarly after ``max_seconds`` and Interrupted after a signal, the
    checkpoint written.
    """
    world = start(config.parallelism, config.device)
    with world.reporting_losses(), ExitStack() as stack:
        world.together(lambda: check_composition(config))
        resolve_mode(config.logger), init_timeout_seconds(config.logger)

        def enter() -> tuple[str, str, dict[str, Any] | None]:
            folder = stack.enter_context(open_run_folder(config, os.environ.get("WANDB_RUN_ID")))
            return str(folder.path), folder.run_id, folder.finished_summary()

        path, run_id, summary = world.from_main(enter)  # rank 0 alone makes and locks it
        folder = RunFolder(Path(path), run_id)
        if summary is not None:
            if world.is_main:
                print_line(f"{folder.path} is finished already; overwrite=true runs it again")
                print_closing_table(summary, _files(folder))
            return summary
        log_path = folder.path / "train.log"
        display = build_display(
            config.logger.progress, config.steps, log_path=log_path, silent=not world.is_main
        )
        try:
            with guard(config, world):
                run = TrainingRun(config, folder, display, world)
                summary = run.run()
        finally:
            display.close()
        if world.is_main:
            files = _files(folder)
            if (wandb := run.loggers.places().get("wandb")) is not None:
                files["wandb"] = _inside(folder.path, wandb)
            print_closing_table(summary, files, log_path)
        return summary


def _files(folder: RunFolder) -> dict[str, Path | str]:
    """The run folder and, relative to it, what is in it."""
    files: dict[str, Path | str] = {"run folder": folder.path, "metrics": folder.metrics.name}
    if checkpoints := list_checkpoints(folder.checkpoints):
        files["checkpoint"] = _inside(folder.path, checkpoints[-1])
    return files


def _inside(folder: Path, place: Path | str) -> str:
    inside = isinstance(place, Path) and place.is_relative_to(folder)
    return str(Path(place).relative_to(folder) if inside else place)


class TrainingRun:
    """Drives a Trainer: resuming, logging, evaluating, saving, stopping, the summary."""

    def __init__(self, config: Config, folder: RunFolder, display: Display, world: World) -> None:
        self.config = config
        self.folder = folder
        self.display = display
        self.world = world
        # of matrices that are larger than a small model: the peak is not to have them
        self.matmul_rate = matmul_flops_per_second(world.device, COMPUTE_DTYPE[config.precision])
        forget_peak_memory(world.device)
        self.data = world.in_turn(
            lambda: build_data(
                config.data,
                config.tokenizer,
                seq_len=config.seq_len,
                cache_dir=cache_dir(config),
                notify=display.message,
                batch_size=config.batch_size,
                seed=config.seed,
                share=share_of_batch(config.batch_size, world),
                max_validation_tokens=config.evaluation.max_tokens,
            )
        )
        world.main_together(lambda: save_tokenizer(self.data.tokenizer, folder.path))
        self.trainer = Trainer(config, self.data, world)
        earlier = resume(self.trainer, folder.checkpoints, display.message)
        resumed = None if earlier is None else self.trainer.step
        self.progress = earlier or Progress()
        self.loggers = Loggers([])
        world.main_together(lambda: self._start_loggers(resumed))
        # All ranks generate, or none: rank 0's environment decides. Only W&B shows what they write.
        self.samples = config.evaluation.samples and world.from_main(
            lambda: resolve_mode(config.logger) is not None
        )
        self.saver = BackgroundSaver(folder.checkpoints, world, config.keep_checkpoints)
        self.start = time.monotonic()

    def _start_loggers(self, resumed: int | None) -> None:
        self.folder.record(data=self.data.fingerprint)
        print_parameter_table(self.trainer.optimizer.table(), self.folder.path / "train.log")
        self.loggers = build_loggers(
            self.config.logger,
            run_dir=self.folder.path,
            run_id=self.folder.run_id,
            run_name=self.folder.path.name,
            is_named=self.config.run_name is not None,
            flat_config=identity(self.config)
            | dict(flatten({"parallelism": plain(self.config.parallelism)})),
            resume_step=resumed,
            warn=self.display.message,
        )

    @property
    def seconds(self) -> float:
        """Wall time of training, evaluation and saving, over all starts."""
        return self.progress.seconds + time.monotonic() - self.start

    def run(self) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        exit_code = 1
        try:
            stop = StopRequest(self.config.max_seconds)
            with stop.listening():
                reason = self._loop(stop)
                self._save_or_fail()
            if reason is not None:
                exit_code = INTERRUPTED_STATUS
                if stop.signal in SCHEDULERS_WARNINGS:
                    self.loggers.preempted()
                self.display.message(
                    f"stopped by {reason} after step {self.trainer.step}, everything saved;"
                    f" the same command goes on (exit status {INTERRUPTED_STATUS})"
                )
                raise Interrupted(stop.signal) if reason.signalled else StoppedEarly
            summary = self.world.from_main(self._write_summary)
            exit_code = 0
        except NonFiniteError as error:
            self._warn_of_failed_save()
            kept = list_checkpoints(self.folder.checkpoints)[-1:]
            last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
            raise TrainingError(
                f"{error}: stopped before the update, {last}; a lower optimizer.lr or grad_clip=1.0 may help"
            ) from error
        finally:
            self.data.train.close()
            self.saver.close()
            self.loggers.close(summary, exit_code)
        return summary

    def _write_summary(self) -> dict[str, Any]:
        summary = self._summary()
        write_json_atomic(self.folder.summary, summary)
        return summary

    def _loop(self, stop: StopRequest) -> Reason | None:
        """Train to the last step, or to the first request to stop, whose reason is returned."""
        config, trainer = self.config, self.trainer
        self.timer = StepTimer()
        reason: Reason | None = None  # with several ranks none is asked alone, so each start makes a step
        while trainer.step < config.steps and reason is None:
            lr = trainer.lr
            result = trainer.train_step(stop.signals)
            self.timer.tick(result.tokens)
            step, last = trainer.step, trainer.step == config.steps
            if step == 1 or step % config.log_every == 0 or last:
                self._log_step(result, lr)
            elif self._memory_is_due(step):
                self._log(self._memory())
            with self.timer.pause():
                if config.eval_every is not None and step % config.eval_every == 0 and not last:
                    self._evaluate()
                if config.save_every is not None and step % config.save_every == 0 and not last:
                    self._begin_save()
            # with several ranks all stop after the same step, whichever of them was asked to
            reason = stop.reason() if self.world.size == 1 else agreed_reason(stop, result.signals)
        if trainer.step == config.steps:
            if self.progress.validation.get("step") != trainer.step:
                self._evaluate()
            return None
        return reason

    def _log_step(self, result: StepResult, lr: float) -> None:
        lap = self.timer.lap()
        assert lap is not None
        self._log(
            {
                "train/loss": result.loss,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm,
                **lap.metrics(),
                "throughput/mfu": self._mfu(lap.tokens_per_second),
                **self._memory(),
                **self.trainer.optimizer.metrics(),
            }
        )

    def _memory_is_due(self, step: int) -> bool:
        """At the first step after a refresh, unless refreshes come as often as lines of the log."""
        optimizer = self.config.optimizer
        gap = optimizer.update_proj_gap if isinstance(optimizer, SubspaceConfig) else 0
        return gap > self.config.log_every and self.trainer.optimizer.begins_round(step)

    def _memory(self) -> dict[str, float]:
        device = self.trainer.device
        metrics = memory_metrics(self.trainer.memory(), peak_memory_bytes(device), device.type)
        return metrics | {"memory/block_state_bytes": self.trainer.optimizer.block_state_bytes()}

    def _mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation: share of the matrix-multiply rate measured at the start."""
        rate = self.matmul_rate * self.world.size
        return tokens_per_second * self.trainer.flops_per_token / rate

    def _log(self, values: dict[str, float]) -> None:
        trainer = self.trainer
        record = {"step": trainer.step, "tokens": trainer.tokens, "time": self.seconds, **values}
        self.progress.record |= record
        self.loggers.log(record, trainer.step)
        self.display.update(trainer.step, record)

    def _evaluate(self) -> None:
        metrics = self.trainer.evaluate()
        self.progress.validation = {"step": self.trainer.step, **metrics}
        self.progress.best_loss = min(self.progress.best_loss, metrics["val/loss"])
        self._log(metrics)
        if self.samples:
            self.loggers.log_table(
                "val/samples", ("prompt", "continuation"), self.trainer.generate(), self.trainer.step
            )

    def _save_or_fail(self) -> None:
        """The last checkpoint, and wait for it."""
        if self.saver.step != self.trainer.step:  # asked to stop, time is short: once is enough
            self._begin_save()
        if (failed := self.saver.wait()) is not None:
            step, error = failed
            raise TrainingError(
                f"the checkpoint of step {step} could not be written ({error});"
                " make room, and the same command trains on from the one before"
            ) from error

    def _warn_of_failed_save(self) -> None:
        """Wait for what is being written. In the middle of a run a full disk costs a warning, not the run."""
        if (failed := self.saver.wait()) is not None:
            step, error = failed
            self.display.message(f"warning: the checkpoint of step {step} was not written: {error}")

    def _begin_save(self) -> None:
        self._warn_of_failed_save()
        state, step = self.trainer.state_dict(), self.trainer.step
        evaluated = self.progress.validation.get("step") == step
        self.saver.start(
            step,
            state,
            self.trainer.shards(),
            {
                **state["trainer"],
                "run": replace(self.progress, seconds=self.seconds).to_json(self.data.fingerprint),
                "score": finite(self.progress.validation["val/loss"]) if evaluated else None,
            },
        )

    def _summary(self) -> dict[str, Any]:
        """The last of each metric, the best validation loss, the median throughput."""
        summary: dict[str, Any] = {
            **self.progress.record,
            **self.progress.validation,
            "best/val/loss": self.progress.best_loss,
        }
        median = self.timer.median()
        if median is not None:
            summary |= median.metrics() | {"throughput/mfu": self._mfu(median.tokens_per_second)}
        unigram = unigram_loss(self.data.train, self.data.validation, self.config.evaluation.max_tokens)
        if unigram is not None:
            summary["val/unigram_perplexity"] = perplexity(unigram)
        return {
            "finished": True,
            "run": self.folder.path.name,
            **summary,
            "step": self.trainer.step,
            "tokens": self.trainer.tokens,
            "time": self.seconds,
        }
