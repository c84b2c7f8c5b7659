"""The optimizer of a run: several parts with one clock."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from rsotrain.errors import UserError
from rsotrain.optim.base import Part
from rsotrain.optim.param_groups import ClaimRow, Claims
from rsotrain.parallel.sharding import Shard

_STEP = "step"


class CompositeOptimizer:
    """Steps its parts together, and saves them as one flat dictionary of tensors.

    Keys are ``<parameter name>.<state name>`` and ``step`` (int64, optimizer steps done); all are there
    from construction on. ``set_lr_factor`` is the schedule's only handle on the learning rates.
    """

    def __init__(self, parts: list[Part], claims: Claims) -> None:
        names = [name for part in parts for name in part.parameters]
        assert sorted(names) == sorted([*claims.blocks, *claims.rest]), "each parameter in exactly one part"
        self.parts = parts
        self.claims = claims
        self.lr_factor = 1.0
        self.steps_done = 0

    def set_lr_factor(self, factor: float) -> None:
        """Every part's learning rate becomes its peak rate times ``factor``."""
        self.lr_factor = factor

    def step(self) -> None:
        """One update. RuntimeError, nothing changed, if a parameter has no gradient."""
        self.gradients()
        self.steps_done += 1
        for part in self.parts:
            part.update(self.steps_done, self.lr_factor)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def gradient_holders(self) -> list[Tensor]:
        """The leaves whose gradients ``step`` reads, each once."""
        return [holder for part in self.parts for holder in part.gradient_holders().values()]

    def reduce_gradients(self) -> None:
        """Sum over ranks the gradients that the backward pass leaves to the optimizer."""
        for part in self.parts:
            part.reduce_gradients()

    def gradients(self) -> list[Tensor]:
        """This rank's pieces of the gradients, reduced; RuntimeError if one is missing."""
        return [gradient for part in self.parts for gradient in part.gradients().values()]

    @contextmanager
    def observing(self, reached: Tensor | None = None) -> Iterator[None]:
        """Each forward pass of training runs inside it; backward passes do not.

        ``reached``: at which positions (batch, seq_len) the loss has a gradient; None: at all.
        """
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.observing(self.steps_done + 1, reached))
            yield

    def begins_round(self, step: int) -> bool:
        """Is ``step`` the first that uses new bases?"""
        return any(part.begins_round(step) for part in self.parts)

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors, not copies; only ``step`` is made anew. Of sharded state this rank's pieces."""
        result = {_STEP: torch.tensor(self.steps_done)}
        for part in self.parts:
            for name, state in part.state.items():
                result |= {f"{name}.{key}": tensor for key, tensor in state.items()}
        return result

    def shards(self) -> dict[str, Shard]:
        """Which piece of each state tensor ``state_dict`` has."""
        result: dict[str, Shard] = {}
        for part in self.parts:
            result |= part.state_shards()
        return result

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises UserError, changing nothing, if names, shapes or dtypes are not those of ``state_dict``."""
        own = self.state_dict()
        hint = "resume with the settings it was saved with, or take only its weights: checkpoint.load=weights"
        for name in [*sorted(own.keys() - state.keys()), *sorted(state.keys() - own.keys())]:
            holds = "has no" if name in own else "has an unexpected"
            raise UserError(f"the checkpoint {holds} optimizer state {name!r}: {hint}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise UserError(
                    f"the checkpoint's optimizer state {name!r} is {state[name].dtype} of shape"
                    f" {tuple(state[name].shape)}, not {tensor.dtype} of {tuple(tensor.shape)}: {hint}"
                )
        for name, tensor in own.items():
            if name != _STEP:
                tensor.copy_(state[name])
        self.steps_done = int(state[_STEP])
        for part in self.parts:
            part.resume()

    def state_bytes(self) -> int:
        """Of all state tensors but the shared ``step``."""
        return sum(part.state_bytes() for part in self.parts)

    def block_state_bytes(self) -> int:
        """Those of the matrices that the method updates; the rest's are the same for every method."""
        return sum(part.state_bytes() for part in self.parts if self._is_of_blocks(part))

    def _is_of_blocks(self, part: Part) -> bool:
        return part.parameters.keys() <= self.claims.blocks.keys()

    def metrics(self) -> dict[str, float]:
        """Of the last refreshes; waits for the device."""
        result: dict[str, float] = {}
        for part in self.parts:
            result |= part.metrics()
        return result

    def table(self) -> list[ClaimRow]:
        """Which parameters go where: one row for each part, one for the frozen."""
        patterns = " | ".join(self.claims.patterns)
        rows = []
        for part in self.parts:
            rows.append(
                ClaimRow(
                    group=part.label,
                    pattern=patterns if self._is_of_blocks(part) else "all others",
                    num_tensors=len(part.parameters),
                    num_elements=sum(p.numel() for p in part.parameters.values()),
                    lr=part.peak_lr,
                    rank=part.describe_rank(),
                    state_bytes=part.state_bytes(),
                )
            )
        if frozen := self.claims.frozen:
            elements = sum(p.numel() for p in frozen.values())
            rows.append(ClaimRow("frozen", ", ".join(frozen), len(frozen), elements, None, "–", 0))
        return rows
