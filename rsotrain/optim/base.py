"""What every optimizer of a group of parameters shares: eager tensor state, a step on local tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.errors import require
from rsotrain.optim.functional import Betas
from rsotrain.optim.moments import Moment, StateKeeper, work_dtype
from rsotrain.optim.norms import norms_of
from rsotrain.optim.parameter_groups import ParameterGroups
from rsotrain.optim.state_size import MatrixSize, StateSize, Weight, WeightsLayout
from rsotrain.parallel.sharding import Shard, local, shard_of
from rsotrain.subspace.samplers import Sampler

# Elements that one batch of matrices may hold in temporaries of each kind: 32 MiB in float32.
BUCKET_ELEMENTS = 1 << 23

Item = TypeVar("Item")


def buckets(
    items: Iterable[Item], size: Callable[[Item], int], limit: int = BUCKET_ELEMENTS
) -> list[list[Item]]:
    """``items`` in order, in runs of at most ``limit`` elements (or of a single item)."""
    result: list[list[Item]] = []
    filled = 0
    for item in items:
        if not result or filled + size(item) > limit:
            result.append([])
            filled = 0
        result[-1].append(item)
        filled += size(item)
    return result


def gradient_of(name: str, parameter: Tensor) -> Tensor:
    """This rank's piece of the gradient; RuntimeError if the backward pass left none."""
    if parameter.grad is None:
        raise RuntimeError(f"{name} has no gradient: it took no part in the loss")
    return local(parameter.grad)


@dataclass(frozen=True)
class Settings:
    """What every optimizer has. ``weight_decay``: decoupled, W ← (1 − η·weight_decay)W."""

    keeper: StateKeeper
    betas: Betas = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


class ParamGroupOptimizer(ABC):
    """An update rule, the parameters that it updates, and one dictionary of state tensors for each.

    ``label`` names the group in tables; ``peak_lr`` is the learning rate where the schedule is 1.
    ``config``: the method's own settings. Parameters may be sharded: it reads and writes this rank's piece of
    each, and keeps its state laid out like it. State is made by ``add_moment`` and ``add_tensor`` alone, in
    the constructor.
    """

    # State that may be whole on every rank though the parameter is sharded. What is whole is the same on all.
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    # Of ``betas``: may the second be 1, which is AdaGrad?
    takes_adagrad_beta: ClassVar[bool] = False

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        self.label = label
        self.parameters = parameters
        self.peak_lr = peak_lr
        self.settings = settings
        self.config: Any = config
        self.keeper = settings.keeper
        self.shards: dict[str, Shard] = {name: shard_of(p) for name, p in parameters.items()}
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        self.moments: dict[str, dict[str, Moment]] = {name: {} for name in parameters}
        self._dims: dict[tuple[str, str], int | None] = {}

    # --- what a method may define beside its constructor ---------------------------------------------

    @abstractmethod
    def update(self, step: int, lr_factor: float) -> None:
        """Apply the gradients. ``step``: 1-based; the learning rate is ``peak_lr * lr_factor``."""

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        """Raise UserError for settings that make no sense, alone or together. None: there is no sampler."""
        require(
            sampler is None,
            f"optimizer={config.name} has no subspace, so sampler={sampler and sampler.name} would do"
            " nothing; leave it out",
        )

    @classmethod
    def prepare_model(
        cls, model: Any, groups: ParameterGroups, config: Any
    ) -> tuple[ParameterGroups, dict[str, Any]]:
        """Change the model's modules, before it is sharded and has memory.

        Returns the groups of its parameters from now on, by name, and what the constructor takes beside
        ``config``. A method that trains other parameters than those of ``groups.blocks`` adds them to the
        model here, freezes the old ones and names the new ones.
        """
        return groups, {}

    @classmethod
    def state_bytes_formula(cls, config: Any, weights: Sequence[Weight], layout: WeightsLayout) -> int:
        """The bytes of its state on rank 0 in closed form, from the shapes of its ``weights`` alone."""
        return sum(layout.bytes_of(cls.matrix_state(config, layout.matrix(w))) for w in weights)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        """The state of one matrix."""
        raise NotImplementedError(
            f"{cls.__module__}.{cls.__name__} does not say how large its state is: define matrix_state"
        )

    # --- state --------------------------------------------------------------------------------------

    def add_moment(self, name: str, key: str, shape: Sequence[int], dim: int | None) -> Moment:
        """A moment of the parameter ``name``: zeros of ``shape``, which is that of this rank's piece.

        ``dim``: the dimension of it in which the parameter's shards divide it; None: whole on every rank.
        """
        parameter, shard = self.parameters[name], self.shards[name]
        dim = None if shard.dim is None else dim
        label = f"{name}{'' if dim is None else shard.label}.{key}"
        moment = self.keeper.moment(key, shape, parameter, label=label, dim=dim)
        self.moments[name][key] = moment
        for state_key, tensor in moment.tensors.items():
            self.add_tensor(name, state_key, tensor, dim)
        return moment

    def add_tensor(self, name: str, key: str, tensor: Tensor, dim: int | None = None) -> Tensor:
        """State that is kept as it is; ``name``: a parameter, or what else the state belongs to."""
        self.state.setdefault(name, {})[key] = tensor
        shard = self.shards.get(name)
        if shard is not None and shard.dim is not None and dim is None:
            assert self.is_replicated(name, key), (
                f"{type(self).__name__} keeps {key} whole on every rank: give the dimension in which it is"
                " divided, or name it in replicated_state"
            )
        self._dims[name, key] = dim
        return tensor

    def is_replicated(self, name: str, key: str) -> bool:
        """May this state be whole on every rank?"""
        return key in self.replicated_state

    def state_shards(self) -> dict[str, Shard]:
        """Which piece each state tensor is, by ``<parameter name>.<state name>``."""
        result = {}
        for name, state in self.state.items():
            own = self.shards[name]
            for key, tensor in state.items():
                shape, dim = list(tensor.shape), self._dims[name, key]
                if own.dim is None or dim is None:
                    result[f"{name}.{key}"] = Shard(tuple(shape), mesh=own.mesh)
                else:
                    shape[dim] = own.shape[own.dim]
                    result[f"{name}.{key}"] = Shard(
                        tuple(shape), dim, own.start, own.stop, own.group, own.mesh
                    )
        return result

    def state_bytes(self) -> int:
        """On this rank."""
        return sum(t.numel() * t.element_size() for s in self.state.values() for t in s.values())

    def resume(self) -> None:  # noqa: B027, most methods have nothing to do
        """Called when the state has been loaded."""

    # --- gradients ------------------------------------------------------------------------------------

    def gradient_holders(self) -> dict[str, Tensor]:
        """The leaves whose ``grad`` is read: the parameters, unless others stand in for them."""
        return dict(self.parameters)

    def reduce_gradients(self) -> None:  # noqa: B027, FSDP has reduced those of the parameters
        """Sum over ranks what the backward pass has not, after the last micro-batch."""

    def gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradients, reduced; RuntimeError if one is missing."""
        return {name: gradient_of(name, holder) for name, holder in self.gradient_holders().items()}

    def gradient_norms(self, step: int) -> list[Tensor]:
        """Float32 norms, 0-d, whose squares add up to that of the gradient's norm, of this rank's pieces.

        ``step``: 1-based, of the update that the gradients are for.
        """
        return norms_of(self.gradients().values())

    def zero_grad(self) -> None:
        for holder in self.gradient_holders().values():
            holder.grad = None

    def observing(self, step: int, valid_mask: Tensor | None) -> AbstractContextManager[None]:
        """Around each forward pass of ``step``: for what is to be seen beside the gradients.

        ``valid_mask``: as in ``CompositeOptimizer.observing``.
        """
        return nullcontext()

    # --- weights --------------------------------------------------------------------------------------

    def decay_factor(self, lr: float) -> float:
        """1 − ηλ: what decoupled weight decay leaves of a weight."""
        return 1.0 - lr * self.settings.weight_decay

    def apply_(self, weight: Tensor, update: Tensor, lr: float) -> None:
        """W ← (1 − ηλ)W + η·update, rounded once; may overwrite ``update``."""
        if self.settings.weight_decay:
            update = update.to(work_dtype(update.dtype)).sub_(weight, alpha=self.settings.weight_decay)
        weight.add_(update, alpha=lr)

    # --- what is told of it -----------------------------------------------------------------------------

    def begins_round(self, step: int) -> bool:
        """Is ``step`` the first that uses new bases? Of staggered ones: the first of them all."""
        return False

    def metrics(self) -> dict[str, float]:
        """Of the last refresh; reads device tensors, so it may synchronise."""
        return {}

    def ranks(self) -> list[int]:
        """Those that occur; none for a method of full rank."""
        return []

    def describe_rank(self) -> str:
        """For the table of parameter groups."""
        ranks = sorted(set(self.ranks()))
        return f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "full"
