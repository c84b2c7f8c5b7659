"""One run from its configuration to its files: what surrounds the training loop."""

import math
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.checkpoints.saving import BackgroundSaver
from rsotrain.config.identity import cache_dir, identity
from rsotrain.config.keys import flatten, plain
from rsotrain.config.schema import Config
from rsotrain.data.build import build_data
from rsotrain.data.position import began_to_repeat, epochs_taken
from rsotrain.data.tokenizer import TOKENIZER_FOLDER, save_tokenizer
from rsotrain.data.unigram import unigram_loss
from rsotrain.errors import (
    INTERRUPTED_STATUS,
    Interrupted,
    NonFiniteError,
    StoppedEarly,
    TrainingError,
)
from rsotrain.files import finite, os_errors_said, reason, write_json_atomic
from rsotrain.instruments.memory import memory_metrics
from rsotrain.models.build import COMPUTE_DTYPE
from rsotrain.optim.with_bases import OptimizerWithBases
from rsotrain.parallel.ranks import World
from rsotrain.running.folder import RunFolder
from rsotrain.running.interrupt import SCHEDULERS_WARNINGS, Reason, StopRequest, agreed_reason
from rsotrain.running.resume import Progress, resume
from rsotrain.tracking.display import Display, print_parameter_table
from rsotrain.tracking.formats import format_seconds
from rsotrain.tracking.loggers import Loggers, build_loggers
from rsotrain.tracking.metrics import StepTimer, forget_peak_memory, peak_memory_bytes
from rsotrain.tracking.wandb_environment import resolve_mode
from rsotrain.training.evaluation import perplexity
from rsotrain.training.flops import matmul_flops_per_second
from rsotrain.training.refresh_cost import costly_refreshes
from rsotrain.training.trainer import Signals, StepResult, Trainer, share_of_batch


class _StoppedError(Exception):
    """Training is to stop, for a ``reason``; ``evaluating``: an evaluation was left, to be repeated."""

    def __init__(self, reason: Reason, *, evaluating: bool) -> None:
        super().__init__(str(reason))
        self.reason, self.evaluating = reason, evaluating


def _evaluation_is_due(config: Config, step: int) -> bool:
    if step == 0:
        return config.evaluation.at_start
    return config.eval_every is not None and step % config.eval_every == 0


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
        world.main_together(self._save_tokenizer)
        self.trainer = Trainer(config, self.data, world)
        for said in costly_refreshes(self.trainer, world.device.type):
            display.message(said)
        earlier = resume(self.trainer, folder.checkpoints, display.message)
        self.resumed = None if earlier is None else self.trainer.step
        self.progress = earlier or Progress()
        # at the start, or where the start before this one was stopped, or killed, in it
        self.evaluates_first = (
            _evaluation_is_due(config, self.trainer.step)
            and self.progress.validation.get("step") != self.trainer.step < config.steps
        )
        self.badly_evaluated: int | None = None  # the step whose evaluation was not finite
        self.loggers = Loggers([])
        world.main_together(self._start_loggers)
        # All ranks generate, or none: rank 0's environment decides. Only W&B shows what they write.
        self.with_samples = config.evaluation.samples and world.from_main(
            lambda: resolve_mode(config.logger) is not None
        )
        self.saver = BackgroundSaver(
            folder.checkpoints, world, config.keep_checkpoints, check=folder.check, warn=display.message
        )
        self.trainer.before_update = self.saver.let_copies_end
        self.stop = StopRequest(config.max_seconds)
        self.start = time.monotonic()
        self.warmup_seconds: float | None = None  # of the first step of this start

    def _save_tokenizer(self) -> None:
        with os_errors_said(f"{self.folder.path / TOKENIZER_FOLDER} cannot be written"):
            save_tokenizer(self.data.tokenizer, self.folder.path)

    def _start_loggers(self) -> None:
        with os_errors_said(f"{self.folder.path} cannot be written"):
            self._open_loggers()

    def _open_loggers(self) -> None:
        self.folder.record(data=self.data.fingerprint)
        print_parameter_table(self.trainer.optimizer.table(), self.folder.log)
        self.loggers = build_loggers(
            self.config.logger,
            run_dir=self.folder.path,
            run_id=self.folder.run_id,
            run_name=self.folder.path.name,
            is_named=self.config.run_name is not None,
            flat_config=identity(self.config)
            | dict(flatten({"parallelism": plain(self.config.parallelism)})),
            resume_step=self.resumed,
            evaluated=self.progress.validation.get("step") == self.resumed,
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
            with self.stop.listening():
                ended = self._loop()
                self._save_or_fail()
            if early := self._ended_early():
                self.display.message(f"stopped early after step {self.trainer.step}: {early}")
            if ended is not None:
                exit_code = INTERRUPTED_STATUS
                self._say_why(ended)
                raise Interrupted(self.stop.signal) if ended.reason.signalled else StoppedEarly
            summary = self.world.from_main(self._write_summary)
            exit_code = 0
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error}, {self._last_good()}; a lower optimizer.lr or grad_clip=1.0 may help"
            ) from error
        finally:
            self.data.train.close()
            self.saver.close()
            self.loggers.close(summary, exit_code)
        return summary

    def _say_why(self, ended: "_StoppedError") -> None:
        if self.stop.signal in SCHEDULERS_WARNINGS:
            self.loggers.preempted()
        where, then = "after", "goes on"
        if ended.evaluating:
            where, then = "in the evaluation after", "evaluates again and goes on"
            if not ended.reason.signalled:
                then += ", which needs more seconds"
        self.display.message(
            f"stopped by {ended.reason} {where} step {self.trainer.step}, everything saved;"
            f" the same command {then} (exit status {INTERRUPTED_STATUS})"
        )

    def _last_good(self) -> str:
        """In words, once what is being written has been."""
        with suppress(NonFiniteError):  # the weights may not have been finite for some steps
            self._warn_of_failed_save()
        kept = list_checkpoints(self.folder.checkpoints)
        if self.badly_evaluated is not None:
            kept = [path for path in kept if not path.name.endswith(f"_{self.badly_evaluated:08d}")]
        return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"

    def _write_summary(self) -> dict[str, Any]:
        summary = self._summary()
        self.folder.check()
        with os_errors_said(f"{self.folder.summary} could not be written", TrainingError):
            write_json_atomic(self.folder.summary, summary)
        return summary

    def _loop(self) -> "_StoppedError | None":
        """Train to the last step, or to the first request to stop, which is returned."""
        config, trainer, stop = self.config, self.trainer, self.stop
        forget_peak_memory(self.trainer.device)  # of tokenising and building: the peak is to be a step's
        self.timer = StepTimer()
        reason: Reason | None = None  # with several ranks none is asked alone, so each start makes a step
        try:
            if self.evaluates_first:
                with self.timer.pause():
                    self._evaluate()
            while trainer.step < config.steps and reason is None and not self._ended_early():
                position = trainer.position
                step = self._first_step if self.warmup_seconds is None else trainer.train_step
                result = step(stop.signals)
                if began_to_repeat(self.data.train, position, trainer.position):
                    self._say_repeated()
                if result.skipped:
                    self.display.message(f"warning: {result.skipped}")
                else:
                    self._after_update(result)
                # with several ranks all stop after the same step, whichever of them was asked to
                reason = stop.reason() if self.world.size == 1 else agreed_reason(stop, result.signals)
            if self._ended_early():
                return None
            if trainer.step == config.steps:
                if self.progress.validation.get("step") != trainer.step:
                    self._evaluate()
                return None
        except _StoppedError as stopped:
            return stopped
        return None if reason is None else _StoppedError(reason, evaluating=False)

    def _first_step(self, signals: Signals) -> StepResult:
        """One that compiles its blocks, where it does."""
        began = time.monotonic()
        result = self.trainer.train_step(signals)
        self.warmup_seconds = time.monotonic() - began
        if self.config.compile:
            self.display.message(
                f"compile=true: the first step took {format_seconds(self.warmup_seconds)}, most of it to"
                " compile; compile=false does without"
            )
        return result

    def _say_repeated(self) -> None:
        self.display.message(
            f"step {self.trainer.step}: the training data begin to repeat, since an epoch has"
            f" {self.data.train.sequences_per_epoch():,} sequences"
        )

    def _after_update(self, result: StepResult) -> None:
        """Log, save and evaluate, where each is due."""
        config, step = self.config, self.trainer.step
        last = step == config.steps
        self.timer.tick(result.tokens)
        if step == 1 or step % config.log_every == 0 or last:
            self._log_step(result)
        elif self._memory_is_due(step):
            self._log(self._memory())
        with self.timer.pause():
            # begun before the evaluation, in which a run may well be killed
            if last or (config.save_every is not None and step % config.save_every == 0):
                self._begin_save()
            if not last and _evaluation_is_due(config, step):
                self._evaluate()

    def _ended_early(self) -> str:
        """Why training ends before its last step; empty where it does not."""
        if self.trainer.step == self.config.steps:
            return ""
        return self.progress.patience.ended(self.config.evaluation)

    def _leave_if_asked(self) -> None:
        """Between the batches of an evaluation, and between the tokens of samples; all ranks call it."""
        stop = self.stop
        reason = (
            stop.reason()
            if self.world.size == 1
            else agreed_reason(stop, tuple(self.world.sum(stop.signals())))
        )
        if reason is not None:
            raise _StoppedError(reason, evaluating=True)

    def _log_step(self, result: StepResult) -> None:
        lap, lr = self.timer.lap(), self.trainer.last_lr
        assert lap is not None
        assert lr is not None
        epochs = epochs_taken(self.data.train, self.trainer.position)
        skipped = {"train/bad_steps": self.trainer.bad_steps.count} if self.config.max_bad_steps else {}
        self._log(
            {
                "train/loss": result.loss,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm,
                **({} if epochs is None else {"train/epoch": epochs}),
                **skipped,
                **lap.metrics(),
                "throughput/mfu": self._mfu(lap.tokens_per_second),
                **self._memory(),
                **self.trainer.optimizer.metrics(),
            }
        )

    def _memory_is_due(self, step: int) -> bool:
        """At the first step after a refresh, unless refreshes come as often as lines of the log."""
        optimizer = self.trainer.optimizer
        gaps = [group.subspace.gap for group in optimizer.groups if isinstance(group, OptimizerWithBases)]
        return max(gaps, default=0) > self.config.log_every and optimizer.begins_round(step)

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
        """Raises _StoppedError where it is left, and NonFiniteError."""
        step = self.trainer.step
        metrics = self.trainer.evaluate(self._leave_if_asked)
        loss = metrics["val/loss"]
        if not math.isfinite(loss):
            self.badly_evaluated = step
            raise NonFiniteError(f"step {step}: the validation loss is {loss}: stopped")
        samples = self.trainer.generate(self._leave_if_asked) if self.with_samples else []
        self.progress.validation = {"step": step, **metrics}
        self.progress.best_loss = min(self.progress.best_loss, loss)
        self.progress.patience = self.progress.patience.after(loss, self.config.evaluation)
        self._log(metrics)
        if self.with_samples:
            self.loggers.log_table("val/samples", ("prompt", "continuation"), samples, step)
        if step in (self.saver.begun, self.resumed):
            self.saver.score(step, loss, self._progress())

    def _progress(self) -> dict[str, Any]:
        return replace(self.progress, seconds=self.seconds).to_json()

    def _save_or_fail(self) -> None:
        """The last checkpoint, and wait for it."""
        if self.saver.begun != self.trainer.step:  # asked to stop, time is short: once is enough
            self._begin_save()
        if (failed := self.saver.wait()) is not None:
            step, error = failed
            self.world.main_together(self.folder.check)  # has it been taken away?
            raise TrainingError(
                f"the checkpoint of step {step} could not be written: {reason(error)};"
                " the same command trains on from the one before"
            ) from error

    def _warn_of_failed_save(self) -> None:
        """Wait for what is being written. In the middle of a run a full disk costs a warning, not the run."""
        if (failed := self.saver.wait()) is not None:
            step, error = failed
            self.display.message(f"warning: the checkpoint of step {step} was not written: {reason(error)}")

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
                "run": self._progress() | {"data": self.data.fingerprint, "settings": identity(self.config)},
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
            if self.config.compile and self.warmup_seconds is not None:
                summary["throughput/warmup_seconds"] = self.warmup_seconds
            summary |= median.metrics() | {"throughput/mfu": self._mfu(median.tokens_per_second)}
        unigram = unigram_loss(self.data.train, self.data.validation, self.config.evaluation.max_tokens)
        if unigram is not None:
            summary["val/unigram_perplexity"] = perplexity(unigram)
        return {
            "finished": True,
            "ended": self._ended_early() or f"all {self.config.steps} steps",
            "run": self.folder.path.name,
            **summary,
            "step": self.trainer.step,
            "tokens": self.trainer.tokens,
            "time": self.seconds,
        }
