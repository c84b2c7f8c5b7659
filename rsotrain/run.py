"""One run from its configuration to its files: what surrounds the training loop."""

import math
import os
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rsotrain import modes
from rsotrain.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from rsotrain.config import Config, Mode
from rsotrain.data.build import build_data
from rsotrain.data.unigram import unigram_loss
from rsotrain.display import Display, build_display, print_closing_table, print_parameter_table
from rsotrain.errors import INTERRUPTED_STATUS, StoppedEarly, TrainingError, UserError
from rsotrain.evaluation import perplexity
from rsotrain.flops import matmul_flops_per_second
from rsotrain.interrupt import StopRequest
from rsotrain.loggers import build_loggers
from rsotrain.metrics import StepTimer, finite, peak_memory_bytes, write_json_atomic
from rsotrain.models.build import COMPUTE_DTYPE
from rsotrain.run_folder import RunFolder, identity, open_run_folder
from rsotrain.trained_model import save_tokenizer
from rsotrain.trainer import NonFiniteError, StepResult, Trainer, check_composition
from rsotrain.wandb_logger import resolve_mode


def run_mode(config: Config) -> dict[str, Any]:
    """Do what ``config.mode`` says and return the run's summary."""
    match config.mode:
        case Mode.train:
            return train(config)
        case Mode.evaluate:
            return modes.evaluate_mode(config, cache_dir(config))
        case Mode.generate:
            return modes.generate_mode(config)
        case Mode.export:
            return modes.export_mode(config)


def cache_dir(config: Config) -> Path:
    """Where tokenizers and tokens are kept between runs."""
    given = config.cache_dir or os.environ.get("RSOTRAIN_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsotrain"


def train(config: Config) -> dict[str, Any]:
    """Train to ``config.steps``, or on from the newest checkpoint of the same run.

    Returns what ``summary.json`` holds. Raises TrainingError if the loss is not finite or the last
    checkpoint cannot be written; StoppedEarly after ``max_seconds``, and SystemExit with
    ``INTERRUPTED_STATUS`` after a signal, the checkpoint written.
    """
    check_composition(config)
    resolve_mode(config.logger.wandb_mode)
    with open_run_folder(config, os.environ.get("WANDB_RUN_ID")) as folder:
        summary = folder.finished_summary()
        if summary is not None:
            print(f"{folder.path} is finished already; overwrite=true runs it again")
            print_closing_table(summary, _files(folder))
            return summary
        display = build_display(
            config.logger.progress, config.steps, start_step=0, log_path=folder.path / "train.log"
        )
        try:
            run = TrainingRun(config, folder, display)
            summary = run.run()
        finally:
            display.close()
        files = _files(folder)
        if (wandb := run.loggers.places().get("wandb")) is not None:
            files["wandb"] = _inside(folder.path, wandb)
        print_closing_table(summary, files, folder.path / "train.log")
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

    def __init__(self, config: Config, folder: RunFolder, display: Display) -> None:
        self.config = config
        self.folder = folder
        self.display = display
        self.data = build_data(
            config.data,
            config.tokenizer,
            seq_len=config.seq_len,
            cache_dir=cache_dir(config),
            notify=display.message,
            batch_size=config.batch_size,
            seed=config.seed,
            max_validation_tokens=config.evaluation.max_tokens,
        )
        save_tokenizer(self.data.tokenizer, folder.path)
        self.trainer = Trainer(config, self.data)
        self.validation: dict[str, float] = {}  # the last evaluation, and its step
        self.best_loss = math.inf
        self.record: dict[str, float | int | str] = {}
        self.earlier_seconds = 0.0  # of earlier starts of this run
        resumed = self._resume()
        print_parameter_table(self.trainer.optimizer.table(), folder.path / "train.log")
        self.matmul_rate = matmul_flops_per_second(self.trainer.device, COMPUTE_DTYPE[config.precision])
        self.loggers = build_loggers(
            config.logger,
            run_dir=folder.path,
            run_id=folder.run_id,
            run_name=folder.path.name,
            flat_config=identity(config),
            resume_step=resumed,
            warn=display.message,
        )
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of training, evaluation and saving, over all starts."""
        return self.earlier_seconds + time.monotonic() - self.start

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
                self.display.message(
                    f"stopped by {reason} after step {self.trainer.step}, everything saved;"
                    f" the same command goes on (exit status {INTERRUPTED_STATUS})"
                )
                raise SystemExit(INTERRUPTED_STATUS) if stop.signalled else StoppedEarly
            summary = self._summary()
            write_json_atomic(self.folder.summary, summary)
            exit_code = 0
        except NonFiniteError as error:
            kept = list_checkpoints(self.folder.checkpoints)[-1:]
            last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
            raise TrainingError(
                f"{error}: stopped before the update, {last}; a lower optimizer.lr or grad_clip=1.0 may help"
            ) from error
        finally:
            self.data.train.close()
            self.loggers.close(summary, exit_code)
        return summary

    def _loop(self, stop: StopRequest) -> str | None:
        """Train to the last step, or to the first request to stop, whose reason is returned."""
        config, trainer = self.config, self.trainer
        self.timer = StepTimer()
        reason = stop.reason()
        while trainer.step < config.steps and reason is None:
            lr = trainer.lr
            result = trainer.train_step()
            self.timer.tick(result.tokens)
            step, last = trainer.step, trainer.step == config.steps
            if step == 1 or step % config.log_every == 0 or last:
                self._log_step(result, lr)
            with self.timer.pause():
                if config.eval_every is not None and step % config.eval_every == 0 and not last:
                    self._evaluate()
                if config.save_every is not None and step % config.save_every == 0 and not last:
                    self._save_or_warn()
            reason = stop.reason()
        if trainer.step == config.steps:
            if self.validation.get("step") != trainer.step:
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
                **self.trainer.memory(),
                "memory/peak_bytes": peak_memory_bytes(self.trainer.device),
                **self.trainer.optimizer.metrics(),
            }
        )

    def _mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation: share of the matrix-multiply rate measured at the start."""
        return tokens_per_second * self.trainer.flops_per_token / self.matmul_rate

    def _log(self, values: dict[str, float]) -> None:
        trainer = self.trainer
        record = {"step": trainer.step, "tokens": trainer.tokens, "time": self.seconds, **values}
        self.record |= record
        self.loggers.log(record, trainer.step)
        self.display.update(trainer.step, record)

    def _evaluate(self) -> None:
        metrics = self.trainer.evaluate()
        self.validation = {"step": self.trainer.step, **metrics}
        self.best_loss = min(self.best_loss, metrics["val/loss"])
        self._log(metrics)
        if self.config.logger.wandb and self.config.evaluation.samples:
            self.loggers.log_table(
                "val/samples", ("prompt", "continuation"), self.trainer.generate(), self.trainer.step
            )

    def _save_or_fail(self) -> None:
        try:
            self._save()
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint of step {self.trainer.step} could not be written ({error});"
                " make room, and the same command trains on from the one before"
            ) from error

    def _save_or_warn(self) -> None:
        """In the middle of a run a full disk costs a warning, not the run."""
        try:
            self._save()
        except (OSError, SafetensorError) as error:
            self.display.message(
                f"warning: the checkpoint of step {self.trainer.step} was not written: {error}"
            )

    def _save(self) -> None:
        state = self.trainer.state_dict()
        own = {
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "validation": self.validation,
            "record": finite(self.record),
            "data": self.data.fingerprint,
        }
        save_checkpoint(
            self.folder.checkpoints,
            self.trainer.step,
            state["model"],
            state["optimizer"],
            {**state["trainer"], "run": {k: v for k, v in own.items() if v != math.inf}},
            keep=self.config.keep_checkpoints,
        )

    def _resume(self) -> int | None:
        """Load the newest checkpoint that can be read; its step, or None to start afresh."""
        for path in reversed(list_checkpoints(self.folder.checkpoints)):
            try:
                model, optimizer, record = load_checkpoint(path, self.trainer.device)
                own, _, _ = record["run"], record["step"], record["tokens"]
                fingerprint, seconds = own["data"], own["seconds"]
                validation, last = own["validation"], own["record"]
            except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
                self.display.message(f"warning: {path.name} cannot be read and is passed over: {error}")
                continue
            if fingerprint != self.data.fingerprint:
                raise UserError(
                    f"the data or the tokenizer have changed since {path} was written;"
                    " bring the old files back, choose another run_name, or overwrite=true to start again"
                )
            self.trainer.load_state_dict({"model": model, "optimizer": optimizer, "trainer": record})
            self.earlier_seconds, self.validation, self.record = seconds, validation, last
            self.best_loss = own.get("best_loss", math.inf)
            self.display.message(f"resumed from {path}")
            return self.trainer.step
        return None

    def _summary(self) -> dict[str, Any]:
        """The last of each metric, the best validation loss, the median throughput."""
        summary: dict[str, Any] = {**self.record, **self.validation, "best/val/loss": self.best_loss}
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
