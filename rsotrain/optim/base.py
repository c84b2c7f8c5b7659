"""What every optimizer part shares: claimed parameters, eager tensor state, a step on local tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rsotrain.optim.functional import Betas
from rsotrain.optim.rounding import stochastic_round_
from rsotrain.parallel.sharding import Shard, local, shard_of
from rsotrain.subspace.seeding import generator

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


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that moments are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class StateKeeper:
    """Moments kept in float32 or bfloat16 and always computed in float32 (float64 for float64 weights).

    bfloat16 moments are rounded stochastically, from a generator seeded by (run seed, state name, step).
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.seed = seed

    def zeros(self, shape: Sequence[int], like: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is torch.bfloat16 else work_dtype(like.dtype)
        return torch.zeros(tuple(shape), dtype=dtype, device=like.device)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors themselves where they are wide enough, wide copies otherwise."""
        return [t.to(work_dtype(t.dtype)) for t in tensors]

    def write(
        self, tensors: Sequence[Tensor], values: Sequence[Tensor], labels: Sequence[str], step: int
    ) -> None:
        """Store what ``read`` gave, after it was changed in place. ``labels`` name each tensor."""
        for tensor, value, label in zip(tensors, values, labels, strict=True):
            if value is not tensor:
                random = generator(self.seed, "rounding", label, step, device=tensor.device)
                stochastic_round_(tensor, value, random)


@dataclass(frozen=True)
class Settings:
    """What every part has. ``weight_decay``: decoupled, W ← (1 − η·weight_decay)W."""

    keeper: StateKeeper
    betas: Betas = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


class Part(ABC):
    """A rule, the parameters it updates, and one dictionary of state tensors for each.

    ``label`` names the group in tables; ``peak_lr`` is the learning rate where the schedule is 1.
    Parameters may be sharded: a part reads and writes this rank's piece of each, and keeps its state laid
    out like it.
    ``own_settings``: what the constructor takes beside that and keeps as attributes, by the names of the
    configuration.
    """

    own_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        **own: Any,
    ) -> None:
        if own.keys() != set(self.own_settings):
            raise TypeError(f"{type(self).__name__} takes {self.own_settings}, not {tuple(own)}")
        vars(self).update(own)
        self.label = label
        self.parameters = parameters
        self.peak_lr = peak_lr
        self.settings = settings
        self.keeper = settings.keeper
        self.shards: dict[str, Shard] = {name: shard_of(p) for name, p in parameters.items()}
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}

    @abstractmethod
    def update(self, step: int, lr_factor: float) -> None:
        """Apply the gradients. ``step``: 1-based; the learning rate is ``peak_lr * lr_factor``."""

    def gradient_holders(self) -> dict[str, Tensor]:
        """The leaves whose ``grad`` this part reads: the parameters, unless others stand in for them."""
        return dict(self.parameters)

    def reduce_gradients(self) -> None:  # noqa: B027, FSDP has reduced those of the parameters
        """Sum over ranks what the backward pass has not, after the last micro-batch."""

    def gradients(self) -> dict[str, Tensor]:
        """This rank's pieces of the gradients, reduced; RuntimeError if one is missing."""
        return {name: gradient_of(name, holder) for name, holder in self.gradient_holders().items()}

    def state_dim(self, name: str, key: str) -> int | None:
        """The dimension in which this state is split like its parameter; None: whole on every rank."""
        return None

    def state_shards(self) -> dict[str, Shard]:
        """Which piece each state tensor is, by ``<parameter name>.<state name>``."""
        result = {}
        for name, state in self.state.items():
            own = self.shards[name]
            for key, tensor in state.items():
                shape, dim = list(tensor.shape), self.state_dim(name, key)
                if own.dim is None or dim is None:
                    result[f"{name}.{key}"] = Shard(tuple(shape), mesh=own.mesh)
                else:
                    shape[dim] = own.shape[own.dim]
                    result[f"{name}.{key}"] = Shard(
                        tuple(shape), dim, own.start, own.stop, own.group, own.mesh
                    )
        return result

    def zero_grad(self) -> None:
        for holder in self.gradient_holders().values():
            holder.grad = None

    def observing(self, step: int, reached: Tensor | None) -> AbstractContextManager[None]:
        """Around each forward pass of ``step``: for what the part needs to see beside the gradients.

        ``reached``: as in ``CompositeOptimizer.observing``.
        """
        return nullcontext()

    def begins_round(self, step: int) -> bool:
        """Is ``step`` the first that uses new bases? Of staggered ones: the first of them all."""
        return False

    def resume(self) -> None:  # noqa: B027, most parts have nothing to do
        """Called when the state has been loaded."""

    def kept_share(self, lr: float) -> float:
        """1 − ηλ: what decoupled weight decay leaves of a weight."""
        return 1.0 - lr * self.settings.weight_decay

    def apply_(self, weight: Tensor, update: Tensor, lr: float) -> None:
        """W ← (1 − ηλ)W + η·update, rounded once; may overwrite ``update``."""
        if self.settings.weight_decay:
            update = update.to(work_dtype(update.dtype)).sub_(weight, alpha=self.settings.weight_decay)
        weight.add_(update, alpha=lr)

    def metrics(self) -> dict[str, float]:
        """Of the last refresh; reads device tensors, so it may synchronise."""
        return {}

    def ranks(self) -> list[int]:
        """Those that occur; none for a method of full rank."""
        return []

    def describe_rank(self) -> str:
        """For the table of claims."""
        ranks = sorted(set(self.ranks()))
        return f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]) if ranks else "full"

    def state_bytes(self) -> int:
        """On this rank."""
        return sum(t.numel() * t.element_size() for s in self.state.values() for t in s.values())
