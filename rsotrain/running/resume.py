"""Where a run goes on: at its own newest checkpoint, or at another run's that it begins from."""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rsotrain.checkpoints.files import KINDS, list_checkpoints, read_checkpoint
from rsotrain.config.identity import differences, identity
from rsotrain.config.schema import LoadWhat
from rsotrain.data.position import other_order
from rsotrain.errors import UserError, require
from rsotrain.files import finite, read_yaml
from rsotrain.models.lora_linear import is_factor
from rsotrain.running.early_stopping import Patience
from rsotrain.tracking.run_files import CONFIG
from rsotrain.training.trainer import Trainer

# What reading hostile files has raised, in safetensors, in torch.distributed.checkpoint and here.
_UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError,
    struct.error, SafetensorError,
)  # fmt: skip


@dataclass
class Progress:
    """What a run knows of itself over all its starts, beside the trainer's state.

    ``seconds``: of training, evaluation and saving, of the earlier starts; ``validation``: the last
    evaluation, and its step; ``record``: the last of each metric; ``patience_best`` and ``patience_waited``:
    of ``Patience``.
    """

    seconds: float = 0.0
    best_loss: float = math.inf
    validation: dict[str, float] = field(default_factory=dict)
    record: dict[str, float | int | str] = field(default_factory=dict)
    patience_best: float = math.inf
    patience_waited: int = 0

    @property
    def patience(self) -> Patience:
        return Patience(self.patience_best, self.patience_waited)

    @patience.setter
    def patience(self, value: Patience) -> None:
        self.patience_best, self.patience_waited = value.best, value.waited

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        own = asdict(self) | {"record": finite(self.record)}
        return {key: value for key, value in own.items() if value != math.inf}

    @classmethod
    def from_json(cls, run: dict[str, Any]) -> "Progress":
        """``run``: what ``to_json`` gave, and perhaps more."""
        return cls(**{f.name: run[f.name] for f in fields(cls) if f.name in run})


def resume(trainer: Trainer, checkpoints: Path, notify: Callable[[str], None]) -> Progress | None:
    """Load the newest of ``checkpoints`` that is whole, else what ``checkpoint.path`` names.

    Returns the progress of the run that goes on; None where a new one begins, be it with loaded weights.
    Raises UserError where nothing of what there is can be read, or where it belongs to other data or
    another model.
    """
    return _Resumption(trainer, notify).own(checkpoints)


class _Resumption:
    def __init__(self, trainer: Trainer, notify: Callable[[str], None]) -> None:
        self.trainer, self.config, self.world = trainer, trainer.config, trainer.world
        self.notify = notify

    def own(self, checkpoints: Path) -> Progress | None:
        paths = self._listed(checkpoints)
        for path in reversed(paths):
            if (found := self._read(path)) is not None:
                self._check_settings(found[1], path)
                return self._take_up(
                    *found,
                    path,
                    f"the data or the tokenizer have changed since {path} was written;"
                    " bring the old files back, choose another run_name, or overwrite=true to start again",
                )
        # the first checkpoint of a new start would remove them, and they may be whole again tomorrow
        require(
            not paths,
            f"no checkpoint in {checkpoints} can be read; bring one back, choose another"
            " run_name, or overwrite=true to start again",
        )
        if self.config.checkpoint.path is not None:
            return self._others(Path(self.config.checkpoint.path).expanduser())
        return None

    def _check_settings(self, run: dict[str, Any], path: Path) -> None:
        """Refuse another run's checkpoint that was put among this run's own; old ones do not say."""
        if "settings" in run and (differing := differences(run["settings"], identity(self.config))):
            raise UserError(
                f"{path} is of a run with other settings ({differing}); take it away,"
                " or begin a new run with it by checkpoint.path=… and another run_name"
            )

    def _others(self, given: Path) -> Progress | None:
        """Start from another run's checkpoint, or from its weights alone."""
        weights_only = self.config.checkpoint.load is LoadWhat.weights
        inside = given / "checkpoints" if (given / "checkpoints").is_dir() else given
        for path in reversed(self._listed(inside) or [given]):
            found = self._read(path, KINDS[:1] if weights_only else KINDS)
            if found is None:
                continue
            if weights_only:
                self.trainer.load_weights(found[0]["model"], found[0]["trainer"].get("adapter_alpha"))
                self.notify(f"begins with the weights of {path}")
                return None
            progress = self._take_up(
                *found,
                path,
                f"checkpoint.path={path} was trained on other data or with another tokenizer;"
                " take the weights alone with checkpoint.load=weights",
            )
            self._tell_jump()
            # another run's evaluations are no reason to end this one
            return replace(progress, patience_best=math.inf, patience_waited=0)
        raise UserError(f"checkpoint.path={given} holds no checkpoint that can be read")

    def _tell_jump(self) -> None:
        """Where this run's schedule does not go on at the rate that the other run had."""
        trainer = self.trainer
        before = trainer.last_lr
        if before is None or not 0 < trainer.step < self.config.steps:
            return
        own, now = trainer.lr_of(trainer.step - 1), trainer.lr
        if math.isclose(own, before, rel_tol=1e-6):
            return
        times = f", {now / before:.3g} times as much" if before > 0 else ""
        self.notify(
            f"warning: the learning rate jumps from {before:.3g} in step {trainer.step} to {now:.3g}{times}:"
            f" the schedule of this run, over {self.config.steps} steps, is not that of the checkpoint"
        )

    def _listed(self, folder: Path) -> list[Path]:
        """As rank 0 sees them."""
        return [Path(p) for p in self.world.from_main(lambda: [str(p) for p in list_checkpoints(folder)])]

    def _read(self, path: Path, kinds: Sequence[str] = KINDS) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What ``load_state_dict`` takes, and the run's own record; None, said aloud, if it is damaged."""

        shards = self.trainer.shards()
        if kinds != KINDS:  # weights are merged with adapters that are whole
            shards = {name: shard for name, shard in shards.items() if not is_factor(name)}

        def read() -> tuple[dict[str, Any], dict[str, Any]]:
            try:
                return read_checkpoint(path, shards, self.world, kinds)
            except _UNREADABLE as error:
                said = str(error).strip().split("\n")[0][:300]
                raise OSError(said or type(error).__name__) from error

        try:
            return self.world.together(read)
        except OSError as error:
            self.notify(f"warning: {path.name} cannot be read and is passed over: {error}")
            return None

    def _take_up(self, state: dict[str, Any], run: dict[str, Any], path: Path, other_data: str) -> Progress:
        require(run["data"] == self.trainer.data.fingerprint, other_data)
        trainer = state["trainer"]
        if "sequences" not in trainer:  # an older checkpoint, of a run whose steps were all alike
            trainer |= _position_by_settings(path, trainer["step"])
        done = trainer["step"]
        require(
            done <= self.config.steps,
            f"{path} is of step {done}, but steps={self.config.steps};"
            " raise steps, or take the weights alone with checkpoint.load=weights",
        )
        try:
            self.trainer.load_state_dict(state)
            reordered = other_order(trainer, self.trainer.data.train, self.config.seed)
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged: its position in the data cannot be read;"
                " take it away, or begin with its weights: checkpoint.load=weights"
            ) from error
        self.notify(f"resumed from {path}")
        if reordered is not None:
            self.notify(reordered)
        return Progress.from_json(run)


def _position_by_settings(checkpoint: Path, step: int) -> dict[str, Any]:
    """What a checkpoint does not say of its place in the data, by the settings of the run that it lies in."""
    try:
        settings = read_yaml(checkpoint.absolute().parents[1] / CONFIG)
        batch_size, seq_len = settings["batch_size"], settings["seq_len"]
    except (UserError, LookupError, TypeError):
        return {}  # moved elsewhere: then it is taken to be of a run like this one
    return {"sequences": step * batch_size, "order": {"seq_len": seq_len}}
