"""The base class of all optimizers: optimizer state created at construction, a step on local tensors."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.choices import WeightRounding
from rsotrain.config.methods import OptimizerConfig
from rsotrain.errors import require
from rsotrain.optim.blocks import block_dim, block_size, is_unsigned
from rsotrain.optim.coded import CodedMoment
from rsotrain.optim.functional import Betas
from rsotrain.optim.moments import Moment, StateKeeper, work_dtype
from rsotrain.optim.norms import norms_of
from rsotrain.optim.parameter_groups import ParameterGroups
from rsotrain.optim.stacks import in_stacks, products, stacks_of
from rsotrain.optim.state_size import MatrixSize, StateSize, Weight, WeightsLayout
from rsotrain.optim.weights import ALL_ROWS, Weights
from rsotrain.parallel.sharding import Shard, local, shard_of
from rsotrain.subspace.projection import Side
from rsotrain.subspace.samplers import Sampler


def gradient_of(name: str, parameter: Tensor) -> Tensor:
    """This rank's piece of the gradient; RuntimeError if the backward pass left none."""
    if parameter.grad is None:
        raise RuntimeError(f"{name} has no gradient: it took no part in the loss")
    return local(parameter.grad)


@dataclass(frozen=True)
class Settings:
    """The settings that all optimizers share. ``weight_decay`` is decoupled: W ← (1 − η·weight_decay)W.

    ``undecayed``: the names of parameters without it.
    """

    keeper: StateKeeper
    betas: Betas = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    undecayed: frozenset[str] = frozenset()
    weight_rounding: WeightRounding = WeightRounding.nearest


class ParamGroupOptimizer(ABC):
    """An update rule, the parameters that it updates, and a dictionary of state tensors for each of them.

    ``label`` names the group in tables; ``peak_lr`` is the learning rate where the schedule's factor is 1.
    ``config``: the method's own settings. Where parameters are sharded, the optimizer reads and writes this
    rank's pieces and shards its state in the same way. All optimizer state is created in the constructor, by
    ``add_moment`` and ``add_tensor``.
    """

    # State that may be replicated although the parameter is sharded; all ranks then hold the same values.
    replicated_state: ClassVar[frozenset[str]] = frozenset()
    # Are the method's matrices sharded in their rows (out), whichever dimension is larger?
    by_rows: ClassVar[bool] = False
    # May ``betas[1]`` be 1, which gives AdaGrad?
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
        self.weights = Weights(parameters, self.shards, settings.weight_rounding, self.keeper.seed)
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        self.moments: dict[str, dict[str, Moment]] = {name: {} for name in parameters}
        self.dims: dict[tuple[str, str], int | None] = {}  # of each state tensor: add_moment's
        self.in_stacks = in_stacks(next(iter(parameters.values())).device)

    # --- what a method may define beside its constructor ---------------------------------------------

    @abstractmethod
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        """Update these parameters: all, or one of ``units``, in any order within a step.

        ``step`` is 1-based; the learning rate is ``peak_lr * lr_factor``.
        """

    def units(self) -> list[list[str]]:
        """The parameters by name, in lists of those that cannot be updated without each other."""
        return [[name] for name in self.parameters]

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        """Raise UserError for settings that make no sense; ``sampler`` is None for sampler=none."""
        require(
            sampler is None,
            f"optimizer={config.name} has no subspace, so sampler={sampler and sampler.name} would do"
            " nothing; leave it out",
        )

    @classmethod
    def prepare_model(
        cls, model: Any, groups: ParameterGroups, config: Any
    ) -> tuple[ParameterGroups, dict[str, Any]]:
        """Change the model's modules, before the model is sharded and has memory.

        Returns the parameter groups of the changed model and further keyword arguments for the constructor.
        A method that trains other parameters than those of ``groups.blocks`` adds them to the model here,
        freezes the old ones and returns groups with the new ones.
        """
        return groups, {}

    @classmethod
    def changes_modules(cls) -> bool:
        """Does the method need the model itself, not parameters alone?"""
        return cls.prepare_model.__func__ is not ParamGroupOptimizer.prepare_model.__func__  # type: ignore[attr-defined]

    @classmethod
    def state_bytes_formula(cls, config: Any, weights: Sequence[Weight], layout: WeightsLayout) -> int:
        """Bytes of the optimizer state on rank 0 in closed form, from the shapes of ``weights`` alone."""
        matrices = [layout.matrix(weight, by_rows=cls.by_rows) for weight in weights]
        return sum(layout.bytes_of(cls.matrix_state(config, matrix), matrix) for matrix in matrices)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        """Size of the optimizer state of one matrix."""
        raise NotImplementedError(
            f"{cls.__module__}.{cls.__name__} does not say how large its state is: define matrix_state"
        )

    @classmethod
    def has_formula(cls) -> bool:
        """Does the method say in closed form how large its state is?"""
        base, own = ParamGroupOptimizer, cls.state_bytes_formula.__func__  # type: ignore[attr-defined]
        states = cls.matrix_state.__func__ is not base.matrix_state.__func__  # type: ignore[attr-defined]
        return states or own is not base.state_bytes_formula.__func__  # type: ignore[attr-defined]

    def update(self, step: int, lr_factor: float) -> None:
        """Update all parameters."""
        self.update_of(self.parameters, step, lr_factor)

    # --- optimizer state ----------------------------------------------------------------------------

    def add_moment(self, name: str, key: str, shape: Sequence[int], dim: int | None) -> Moment:
        """Add a moment of the parameter ``name``: zeros of ``shape``, the shape of this rank's piece.

        ``dim``: the dimension in which the moment is sharded as its parameter is; None: it is replicated.
        """
        parameter, shard = self.parameters[name], self.shards[name]
        dim = None if shard.dim is None else dim
        label = f"{name}{'' if dim is None else shard.label}.{key}"
        coded = self._coded(name, key, shape, dim) if self.keeper.coded else None
        moment = self.keeper.moment(key, shape, parameter, label=label, dim=dim, coded=coded)
        self.moments[name][key] = moment
        for state_key, tensor in moment.tensors.items():
            self.add_tensor(name, state_key, tensor, dim)
        return moment

    def _coded(self, name: str, key: str, shape: Sequence[int], dim: int | None) -> CodedMoment | None:
        """The moment in 8 bits; None where it is too small to be kept so."""
        parameter, shard, whole = self.parameters[name], self.shards[name], list(shape)
        start = [0] * len(whole)
        if dim is not None:
            assert shard.dim is not None
            whole[dim], start[dim] = shard.shape[shard.dim], shard.start
        along = block_dim(whole, shard.shape, rows=self.by_rows or not parameter.requires_grad)
        size = block_size(whole, along)
        if size is None:
            return None
        require(
            along != dim,
            f"moments in 8 bits: {shard.pieces} ranks share the {shard.shape[0]} rows of {name}, as"
            f" its {shard.shape[1]} columns are not divisible by {shard.pieces}, and would cut the blocks of"
            " its moments; use a number of ranks that divides the columns, or do without"
            " optimizer.state_dtype=int8 and optimizer.rest=adam8bit",
        )
        return CodedMoment.zeros(
            shape,
            (whole[0], whole[1]),
            (start[0], start[1]),
            along,
            size,
            unsigned=is_unsigned(key),
            label=f"{name}.{key}",
            device=parameter.device,
        )

    def add_tensor(self, name: str, key: str, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Add a state tensor of the parameter (or input group) ``name``; ``dim`` as in ``add_moment``."""
        self.state.setdefault(name, {})[key] = tensor
        shard = self.shards.get(name)
        if shard is not None and shard.dim is not None and dim is None:
            assert self.is_replicated(name, key), (
                f"{type(self).__name__} replicates {key} on all ranks: give the dimension in which it is"
                " sharded, or name it in replicated_state"
            )
        self.dims[name, key] = dim
        return tensor

    def is_replicated(self, name: str, key: str) -> bool:
        """May this state tensor be replicated although the parameter is sharded?"""
        return key in self.replicated_state

    def state_shards(self) -> dict[str, Shard]:
        """Which piece of the whole each state tensor is, by ``<parameter name>.<state name>``."""
        result = {}
        for name, state in self.state.items():
            own = self.shards[name]
            for key, tensor in state.items():
                shape, dim = list(tensor.shape), self.dims[name, key]
                if own.dim is None or dim is None:
                    result[f"{name}.{key}"] = Shard(tuple(shape), mesh=own.mesh)
                else:
                    shape[dim] = own.shape[own.dim]
                    result[f"{name}.{key}"] = Shard(
                        tuple(shape), dim, own.start, own.stop, own.group, own.mesh
                    )
        return result

    def rate_factor(self, step: int) -> float:
        """What the method multiplies the rates of all weights by in ``step`` (1-based)."""
        return 1.0

    def costliest_step(self) -> int | None:
        """The first step (1-based) that does more than the others; None where all are alike."""
        return None

    def state_bytes(self) -> int:
        """Bytes of the optimizer state on this rank."""
        return sum(t.numel() * t.element_size() for s in self.state.values() for t in s.values())

    def weights_held(self) -> Iterable[Tensor]:
        """The parameters that the method trains, and those that it has frozen to train others."""
        return self.parameters.values()

    def resume(self) -> None:  # noqa: B027, most methods have nothing to do
        """Called after the optimizer state has been loaded."""

    def join_state(self) -> None:
        """Let the state of a stack share memory, of which ``stacked`` is then a view. Called when made."""
        for names in self.stacks if self.in_stacks else ():
            for key in self.joined_keys(names[0]):
                joined = torch.stack([self.state[name][key] for name in names])
                for name, tensor in zip(names, joined.unbind(), strict=True):
                    self.state[name][key] = tensor
                    if key in self.moments[name]:
                        self.moments[name][key] = replace(self.moments[name][key], values=tensor)

    def joined_keys(self, name: str) -> list[str]:
        """The state tensors of ``name`` that nothing but ``state`` and ``moments`` refers to."""
        coded = [moment for moment in self.moments[name].values() if moment.coded is not None]
        return [key for key in self.state[name] if not any(key in moment.tensors for moment in coded)]

    # --- gradients ------------------------------------------------------------------------------------

    def gradient_holders(self) -> dict[str, Tensor]:
        """The leaf tensors whose ``grad`` is read: the parameters, or tensors that replace them."""
        return dict(self.parameters)

    def reduce_gradients(self) -> None:  # noqa: B027, FSDP reduces the gradients of parameters
        """Sum over ranks the gradients that FSDP does not reduce, after the last micro-batch."""

    def partial_gradients(self) -> Iterator[Tensor]:
        """What there is of the gradients after the backward pass of a micro-batch."""
        return (holder.grad for holder in self.gradient_holders().values() if holder.grad is not None)

    def gradients(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """This rank's pieces of the reduced gradients; RuntimeError if a gradient is missing.

        ``names``: of the parameters whose gradients these are; None: of all.
        """
        holders = self.gradient_holders()
        return {name: gradient_of(name, holders[name]) for name in (holders if names is None else names)}

    def gradient_norms(self, step: int, names: Collection[str] | None = None) -> list[Tensor]:
        """Norms (0-d, float32) of this rank's pieces; their squares sum to the square of the gradient norm.

        ``step``: the 1-based step whose gradients these are. ``names``: as for ``gradients``.
        """
        return norms_of(self.gradients(names).values())

    def zero_grad(self) -> None:
        for holder in self.gradient_holders().values():
            holder.grad = None

    def observing(self, step: int, valid_mask: Tensor | None) -> AbstractContextManager[None]:
        """A context around each forward pass of ``step``, for methods that use activations.

        ``valid_mask``: as in ``CompositeOptimizer.observing``.
        """
        return nullcontext()

    # --- weights --------------------------------------------------------------------------------------

    def decay_of(self, name: str) -> float:
        """λ of the parameter ``name``."""
        return 0.0 if name in self.settings.undecayed else self.settings.weight_decay

    def apply_(
        self,
        name: str,
        update: Tensor,
        lr: float,
        step: int,
        side: Side = Side.right,
        rows: slice = ALL_ROWS,
    ) -> None:
        """W ← (1 − ηλ)W + η·update, rounded once, for this rank's piece of W. May overwrite ``update``.

        ``update``: of the shape of the piece, or of these ``rows`` of it; or of its oriented view's (M×k)
        where ``side`` is its side.
        """
        self.weights.add_(name, update, lr, step, decay=self.decay_of(name), side=side, rows=rows)

    def apply_lifted_(
        self, name: str, low_rank: Tensor, basis: Tensor, lr: float, step: int, side: Side = Side.right
    ) -> None:
        """The same for the update ``low_rank`` Qᵀ (M×r and k×r)."""
        decay = self.decay_of(name)
        self.weights.add_lifted_(name, low_rank, basis, lr, step, decay=decay, side=side)

    def apply_stack_(
        self,
        names: Sequence[str],
        updates: Tensor,
        lr: float,
        step: int,
        side: Side = Side.right,
        scale: float = 1.0,
    ) -> None:
        """``apply_`` of ``scale``·update for n weights of one shape and decay; ``updates``: (n, …).

        May overwrite them.
        """
        if not self.in_stacks:
            for name, update in zip(names, updates.unbind(), strict=True):
                self.apply_(name, update if scale == 1.0 else update.mul_(scale), lr, step, side)
            return
        own = updates if side is Side.right else updates.mT
        kept = 1.0 - lr * self.decay_of(names[0])
        self.weights.move_all_(names, list(own.unbind()), lr * scale, step, kept=kept)

    def apply_lifted_stack_(
        self,
        names: Sequence[str],
        low_rank: Tensor,
        basis: Tensor,
        lr: float,
        step: int,
        side: Side = Side.right,
    ) -> None:
        """``apply_lifted_`` for n weights of one shape and decay; (n, M, r) and (n, k, r)."""
        if not self.in_stacks:
            for name, update, own in zip(names, low_rank.unbind(), basis.unbind(), strict=True):
                self.apply_lifted_(name, update, own, lr, step, side)
            return
        factor = low_rank.to(basis.dtype)
        # in the memory layout of the weights
        lifted = products(factor, basis.mT) if side is Side.right else products(basis, factor.mT)
        kept = 1.0 - lr * self.decay_of(names[0])
        self.weights.move_all_(names, list(lifted.unbind()), lr, step, kept=kept)

    @cached_property
    def one(self) -> Tensor:
        """1 in at least float32, 1×1×1, where the parameters are, to add a share of it to products."""
        first = next(iter(self.parameters.values()))
        return torch.ones(1, 1, 1, dtype=work_dtype(first.dtype), device=first.device)

    def stack_kind(self, name: str) -> Hashable:
        """What parameters of one stack have in common: their update is the same function."""
        return self.shards[name].shape, self.parameters[name].dtype, self.decay_of(name)

    @cached_property
    def stacks(self) -> list[list[str]]:
        """The parameters by name that are updated together: those of a kind on a GPU, one by one on a CPU.

        By the sizes of whole parameters, so that all ranks have the same stacks.
        """
        # moments in 8 bits are widened for the update, where others are in their own memory
        itemsize = self.stack_itemsize * (2 if self.keeper.coded else 1)
        return stacks_of(self.parameters, self.stack_kind, self.shards, itemsize)

    @property
    def stack_itemsize(self) -> int:
        """Bytes of an element of the temporaries that an update of a stack makes."""
        return torch.float32.itemsize

    # --- metrics and tables -----------------------------------------------------------------------------

    def begins_round(self, step: int) -> bool:
        """Does a round of refreshes take effect in ``step``? Where staggered: the round's first refresh."""
        return False

    def metrics(self) -> dict[str, float]:
        """Metrics of the last refresh. They are read from the device, which may synchronise."""
        return {}

    def ranks(self) -> list[int]:
        """The ranks of all matrices; empty for a full-rank method."""
        return []

    def describe_rank(self) -> str:
        """The rank as the table of parameter groups shows it."""
        ranks = sorted(set(self.ranks()))
        return f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "full"
