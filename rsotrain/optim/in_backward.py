"""Updates within the backward pass: a gradient lives until its parameter has been updated, and no longer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from rsotrain.instruments.memory import tensors_bytes
from rsotrain.instruments.phases import Phase, phase
from rsotrain.optim.base import ParamGroupOptimizer


@dataclass(eq=False)
class Unit:
    """Parameters that are updated together, and which of their gradients there are so far."""

    group: ParamGroupOptimizer
    names: list[str]
    arrived: dict[str, Tensor] = field(default_factory=dict)


class UpdatesInBackward:
    """Updates the parameters of ``groups`` as the backward pass brings their gradients, which it drops.

    The arithmetic of each parameter is that of a step after the backward pass, so the weights are the same.
    The backward pass has no use for a weight any more once it has the gradient, as a product gives the
    gradients of its input and of its weight together. It is for one process and one backward pass a step:
    a gradient must be whole when it arrives. ``norms``: the norms of the gradients of this step so far.
    """

    def __init__(self, groups: Iterable[ParamGroupOptimizer]) -> None:
        self.units = [Unit(group, names) for group in groups for names in group.units()]
        self.norms: list[Tensor] = []
        self._updated: set[Unit] = set()
        self._now: tuple[int, float] | None = None  # (step, factor of the learning rate) within the pass
        self._bytes: dict[ParamGroupOptimizer, int] = {}  # of the gradients that are there
        self._most: dict[ParamGroupOptimizer, int] = {}
        self._most_of_all = 0
        for unit in self.units:
            holders = unit.group.gradient_holders()
            for name in unit.names:
                holders[name].register_post_accumulate_grad_hook(partial(self._arrived, unit, name))

    @contextmanager
    def updating(self, step: int, lr_factor: float) -> Iterator[None]:
        """Around the backward pass of ``step`` (1-based); outside, gradients stay where they are."""
        self._now = step, lr_factor
        try:
            yield
        finally:
            self._now = None

    def _arrived(self, unit: Unit, name: str, holder: Tensor) -> None:
        if self._now is None or holder.grad is None:
            return
        unit.arrived[name] = holder.grad
        self._count(unit.group, tensors_bytes([holder.grad]))
        if len(unit.arrived) == len(unit.names):
            self.update(unit, *self._now)

    def update(self, unit: Unit, step: int, lr_factor: float) -> None:
        """Update the parameters of ``unit``, whose gradients are all there, and drop these."""
        with phase(Phase.optimizer_step):
            self.norms += unit.group.gradient_norms(step, unit.names)
            unit.group.update_of(unit.names, step, lr_factor)
        holders = unit.group.gradient_holders()
        for name in unit.names:
            holders[name].grad = None
        self._count(unit.group, -tensors_bytes(unit.arrived.values()))
        unit.arrived.clear()
        self._updated.add(unit)

    def _count(self, group: ParamGroupOptimizer, change: int) -> None:
        self._bytes[group] = self._bytes.get(group, 0) + change
        self._most[group] = max(self._most.get(group, 0), self._bytes[group])
        self._most_of_all = max(self._most_of_all, sum(self._bytes.values()))

    def most_bytes(self, groups: Iterable[ParamGroupOptimizer] | None = None) -> int:
        """The most bytes of gradients at a time so far. ``groups``: of one of these; None: of all."""
        if groups is None:
            return self._most_of_all
        return max((self._most.get(group, 0) for group in groups), default=0)

    def check(self) -> None:
        """Raise RuntimeError if a parameter has not been updated in this step."""
        for unit in self.units:
            if unit not in self._updated:
                missing = next(name for name in unit.names if name not in unit.arrived)
                raise RuntimeError(f"{missing} has no gradient: it took no part in the loss")

    def clear(self) -> None:
        """Be ready for the next step."""
        self._updated.clear()
        self.norms = []
        self._bytes.clear()
        for unit in self.units:
            unit.arrived.clear()
