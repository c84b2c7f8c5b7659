"""A trial of a user's own optimizer on a small model, for what our tests hold of the package's methods.

The trial trains a LLaMA of two layers for a few steps with the real Trainer. It costs about a second, and is
made before each run of such a method, on the processes of the run: what holds of sharding is tried where the
run is sharded, and updates within the backward pass where the run has them.
"""

import inspect
import io
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rsotrain import plugged
from rsotrain.config.choices import WeightRounding
from rsotrain.config.data import SyntheticDataConfig
from rsotrain.config.groups import all_methods
from rsotrain.config.methods import OptimizerConfig, SubspaceConfig
from rsotrain.config.model import ModelConfig
from rsotrain.config.schedules import ConstantConfig
from rsotrain.config.schema import ActivationCheckpointing, CheckpointConfig, Config, Precision
from rsotrain.errors import UserError, require
from rsotrain.optim.formulas import state_bytes
from rsotrain.optim.registered import method_of
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import local
from rsotrain.training.random_data import random_data
from rsotrain.training.trainer import Trainer

STEPS = 3  # a refresh and a step after it
GAP, RANK, LR = 2, 4, 0.01
# Of the way that the weights have gone: float32 sums in another order through three steps, which signs and
# square roots amplify, and orthogonalisation in bfloat16, which has three digits. The norm of a piece in
# place of the whole's is wrong by a factor of √2 with two ranks, and by more with more of them.
TOLERANCE = 0.1
_MODEL = ModelConfig(
    name="trial", hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=16, vocab_size=48,
)  # fmt: skip


def try_plugged(config: Config, world: World) -> str | None:
    """Try those methods of ``config`` that are the user's own, each by itself.

    Returns why one could not be tried, where its settings do not suit the small model. Raises UserError with
    the first thing that a run relies on and the method does not do.
    """
    untried = [
        _tried(replace(config, optimizer=replace(optimizer, groups=[]), sampler=sampler), world)
        for optimizer, sampler in all_methods(config.optimizer, config.sampler)
        if plugged.is_plugged(type(optimizer))
    ]
    return next((reason for reason in untried if reason is not None), None)


def _tried(config: Config, world: World) -> str | None:
    trial = Trial(_small(config, world), world)
    try:
        trial.trainer()
    except UserError as error:
        return f"{trial.label} was not tried on a small model, which its settings do not suit: {error}"
    except Exception as error:
        raise trial.failure(error) from error
    for check in trial.checks():
        try:
            world.together(check)
        except UserError:
            raise
        except Exception as error:
            raise trial.failure(error) from error
    return None


def _small(config: Config, world: World) -> Config:
    """The same method, with a rank and a gap that fit the model, at a rate that moves it."""
    own = config.optimizer
    patterns = next(f for f in fields(OptimizerConfig) if f.name == "block_parameters").default_factory
    assert callable(patterns)
    changed: dict[str, Any] = {
        "lr": LR, "scale": 1.0, "weight_rounding": WeightRounding.nearest, "block_parameters": patterns(),
    }  # fmt: skip
    if isinstance(own, SubspaceConfig):
        changed["update_proj_gap"] = min(own.update_proj_gap, GAP)
        changed["rank"] = min(own.rank, RANK) if isinstance(own.rank, int) else own.rank
    return replace(
        config,
        model=_MODEL,
        optimizer=replace(own, **changed),
        data=SyntheticDataConfig(name="trial"),
        lr_scheduler=ConstantConfig(name="constant", warmup_fraction=0.0),
        parallelism=replace(config.parallelism, world_size=world.size),
        checkpoint=CheckpointConfig(),
        precision=Precision.fp32,
        activation_checkpointing=ActivationCheckpointing.none,
        steps=2 * STEPS, batch_size=2 * world.size, micro_batch_size=None, seq_len=8, grad_clip=None,
        epochs=None, max_bad_steps=0, spike_factor=None, compile=False,
    )  # fmt: skip


class Trial:
    """What is tried of a method with the small ``config`` on ``world``."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.data = random_data(config)
        self.label = f"optimizer={config.optimizer.name}"

    def checks(self) -> list[Callable[[], None]]:
        own = [self.makes_its_state_at_once, self.resumes, self.obeys_the_rate, self.has_the_stated_size]
        if self.world.mesh is not None:
            own.append(self.trains_alike_on_ranks)
        if self.config.optimizer.update_in_backward:
            own.append(self.trains_alike_in_backward)
        return own

    def trainer(self, world: World | None = None, **settings: Any) -> Trainer:
        """A trainer at its first step; ``settings``: of the optimizer, in place of the trial's."""
        config = replace(self.config, optimizer=replace(self.config.optimizer, **settings))
        return Trainer(config, self.data, world or self.world)

    def failure(self, error: Exception) -> UserError:
        frames = traceback.extract_tb(error.__traceback__)
        own = inspect.getsourcefile(method_of(self.config.optimizer))
        frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        said = (str(error).splitlines() or [""])[0]
        return UserError(
            f"{self.label} fails on a small model: {type(error).__name__}: {said}"
            f" ({frame.filename}, line {frame.lineno}); HYDRA_FULL_ERROR=1 shows the whole error"
        )

    # --- what a run relies on ---------------------------------------------------------------------

    def makes_its_state_at_once(self) -> None:
        """The same state from the constructor on, tensors alone, each known to ``add_tensor``."""
        trainer = self.trainer()
        for group in trainer.optimizer.groups:
            for name, state in group.state.items():
                for key, tensor in state.items():
                    require(
                        isinstance(tensor, Tensor),
                        f"{self.label} keeps a {type(tensor).__name__} as the state {name}.{key}; a"
                        " checkpoint holds tensors alone, made by add_moment and add_tensor",
                    )
                    require(
                        (name, key) in group.dims,
                        f"{self.label} keeps the state {name}.{key}, which no add_moment or add_tensor has"
                        " made",
                    )
        before = _kinds(trainer)
        _train(trainer, STEPS)
        for name in sorted(before.keys() ^ _kinds(trainer).keys()):
            raise UserError(
                f"{self.label} has the state {name} {'no longer' if name in before else 'only'} after a step;"
                " make all state in the constructor"
            )
        for name, kind in _kinds(trainer).items():
            require(
                kind == before[name],
                f"{self.label} turns the state {name} from {before[name]} into {kind} in a step; change its"
                " values in place",
            )
        start = dict(self.trainer().model.named_parameters())
        for name, parameter in trainer.model.named_parameters():
            require(
                not parameter.requires_grad or not _equal(parameter, start[name]),
                f"{self.label} leaves {name} as it is in {STEPS} steps",
            )
            require(bool(torch.isfinite(parameter).all()), f"{self.label} makes {name} infinite or NaN")

    def resumes(self) -> None:
        """From a checkpoint it goes on as without one, to the bit."""
        trainer = self.trainer()
        _train(trainer, STEPS)
        stream = io.BytesIO()
        saved = trainer.state_dict()
        torch.save({kind: saved[kind] for kind in ("model", "optimizer")}, stream)
        stream.seek(0)
        resumed = self.trainer()
        resumed.load_state_dict(torch.load(stream, weights_only=True) | {"trainer": saved["trainer"]})
        for one in (trainer, resumed):
            _train(one, STEPS)
        name = _first_difference(trainer, resumed)
        require(
            name is None,
            f"{self.label} does not go on from a checkpoint as without one: {name} differs; keep all that an"
            " update depends on in add_moment and add_tensor, and draw random numbers from a generator of"
            " rsotrain.subspace.seeding",
        )

    def obeys_the_rate(self) -> None:
        """A rate of 0 moves nothing: the schedule reaches every update."""
        trainer, start = self.trainer(lr=0.0), self.trainer(lr=0.0)
        _train(trainer, 1)
        for (name, parameter), before in zip(
            trainer.model.named_parameters(), start.model.parameters(), strict=True
        ):
            require(
                _equal(parameter, before),
                f"{self.label} moves {name} at a learning rate of 0; use peak_lr * lr_factor",
            )

    def has_the_stated_size(self) -> None:
        formula = state_bytes(self.config, self.data.tokenizer.vocab_size)
        found = self.trainer().optimizer.state_bytes()
        if formula is not None and self.world.is_main:  # the formula is of the rank with the largest pieces
            require(
                found == formula.total,
                f"{self.label} has {found:,} bytes of state on a small model, and {formula.total:,} by its"
                " matrix_state; correct that, or leave it out",
            )

    def trains_alike_on_ranks(self) -> None:
        """Sharded training is the training of one process, within rounding."""
        together, alone = self.trainer(), self.trainer(World(self.world.device))
        start = {name: p.detach().clone() for name, p in alone.model.named_parameters()}
        for one in (together, alone):
            _train(one, STEPS)
        shards, found = together.shards(), together.state_dict()["model"]
        for name, parameter in alone.model.named_parameters():
            whole = shards[name].all_gather(found[name]) if name in shards else found[name]
            moved = torch.linalg.vector_norm(parameter - start[name])
            error = float(torch.linalg.vector_norm(whole - parameter) / moved) if moved else 0.0
            require(
                error <= TOLERANCE,
                f"{self.label} does not train {self.world.size} processes as one: {name} is elsewhere by"
                f" {error:.0%} of its way after {STEPS} steps; sum what is taken over a whole matrix with"
                " self.shards[name], set by_rows, or take parallelism=single",
            )

    def trains_alike_in_backward(self) -> None:
        """Parameters that are updated one by one go where they go together, to the bit."""
        within, after = self.trainer(), self.trainer(update_in_backward=False)
        for one in (within, after):
            _train(one, STEPS)
        name = _first_difference(within, after)
        require(
            name is None,
            f"{self.label} with update_in_backward=true does not do what it does without: {name} differs; let"
            " update_of update the parameters that it is given alone, or give those that belong together in"
            " units",
        )


def _train(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.train_step()


def _kinds(trainer: Trainer) -> dict[str, str]:
    """dtype and shape of each tensor of the optimizer state, by name."""
    state = trainer.optimizer.state_dict()
    return {name: f"{tensor.dtype} of {tuple(tensor.shape)}" for name, tensor in state.items()}


def _first_difference(one: Trainer, other: Trainer) -> str | None:
    """The name of a weight, or of a tensor of the optimizer state, that is not the same to the bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    for kind in ("model", "optimizer"):
        for name, tensor in mine[kind].items():
            if not _equal(tensor, theirs[kind][name]):
                return name
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(local(one), local(other))
