"""The optimizer of a run: one optimizer for each group of parameters, all with one clock."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from rsotrain.errors import UserError
from rsotrain.instruments.memory import tensors_bytes
from rsotrain.optim.base import ParamGroupOptimizer
from rsotrain.optim.in_backward import UpdatesInBackward
from rsotrain.optim.parameter_groups import GroupRow, ParameterGroups
from rsotrain.parallel.sharding import Shard

_STEP = "step"
_HINT = "resume with the settings it was saved with, or take only its weights: checkpoint.load=weights"


class CompositeOptimizer:
    """Steps the optimizers of all groups together and saves their state as one flat dictionary of tensors.

    Keys are ``<parameter name>.<state name>`` and ``step`` (int64, optimizer steps done); all of them exist
    from construction on. The schedule acts on the learning rates through ``set_lr_factor`` only.
    ``in_backward``: the parameters are updated within ``backward_pass``, and ``step`` has only to end the
    step. One process, one backward pass a step; nothing may need all gradients at a time.
    """

    def __init__(
        self,
        groups: list[ParamGroupOptimizer],
        parameter_groups: ParameterGroups,
        *,
        in_backward: bool = False,
    ) -> None:
        names = [name for group in groups for name in group.parameters]
        trained = [*parameter_groups.by_methods, *parameter_groups.rest]
        assert sorted(names) == sorted(trained), "each parameter in exactly one group"
        self.groups = groups
        self.parameter_groups = parameter_groups
        self.in_backward = UpdatesInBackward(groups) if in_backward else None
        self.lr_factor = 1.0
        self.steps_done = 0

    def set_lr_factor(self, factor: float) -> None:
        """Set the learning rate of every group to its peak rate times ``factor``."""
        self.lr_factor = factor

    def rate_factor(self, step: int) -> float:
        """What the methods multiply all rates by in ``step`` (1-based), beside the schedule."""
        return math.prod(group.rate_factor(step) for group in self.groups)

    def step(self) -> None:
        """One update. Raises RuntimeError and changes nothing if a parameter has no gradient.

        With ``in_backward`` the update is done, and the error comes too late for the other parameters.
        """
        if self.in_backward is not None:
            self.in_backward.check()
            self.steps_done += 1
            return
        self.gradients()
        self.steps_done += 1
        for group in self.groups:
            group.update(self.steps_done, self.lr_factor)

    def zero_grad(self) -> None:
        if self.in_backward is not None:
            self.in_backward.clear()
        for group in self.groups:
            group.zero_grad()

    def backward_pass(self) -> AbstractContextManager[None]:
        """Around each backward pass of training, in which the parameters are updated with ``in_backward``."""
        if self.in_backward is None:
            return nullcontext()
        return self.in_backward.updating(self.steps_done + 1, self.lr_factor)

    def gradient_holders(self) -> list[Tensor]:
        """The leaf tensors whose gradients ``step`` reads, each once."""
        return [holder for group in self.groups for holder in group.gradient_holders().values()]

    def partial_gradients(self) -> list[Tensor]:
        """What there is of the gradients after the backward pass of a micro-batch."""
        return [gradient for group in self.groups for gradient in group.partial_gradients()]

    def reduce_gradients(self) -> None:
        """Sum over ranks the gradients that FSDP does not reduce, after the last micro-batch."""
        for group in self.groups:
            group.reduce_gradients()

    def gradients(self) -> list[Tensor]:
        """This rank's pieces of the reduced gradients; RuntimeError if a gradient is missing.

        With ``in_backward`` there are none after the backward pass.
        """
        if self.in_backward is not None:
            return []
        return [gradient for group in self.groups for gradient in group.gradients().values()]

    def gradient_norms(self) -> list[Tensor]:
        """Norms (0-d, float32) whose squares sum to the squared gradient norm that is logged and clipped."""
        if self.in_backward is not None:
            self.in_backward.check()
            return self.in_backward.norms
        return [norm for group in self.groups for norm in group.gradient_norms(self.steps_done + 1)]

    def gradients_bytes(self) -> int:
        """Bytes of the gradients of a step; with ``in_backward`` the most of them at a time so far."""
        return tensors_bytes(self.gradients()) if self.in_backward is None else self.in_backward.most_bytes()

    def block_gradients_bytes(self) -> int:
        """The same of the attention and MLP weights alone, or of what else methods train."""
        if self.in_backward is not None:
            return self.in_backward.most_bytes(self.methods)
        return sum(tensors_bytes(group.gradients().values()) for group in self.methods)

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        """Scale the gradients so that their ``norm``, the root of the sum of squares of all
        ``gradient_norms``, is at most ``max_norm``."""
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self.gradients(), factor)

    @contextmanager
    def observing(self, valid_mask: Tensor | None = None) -> Iterator[None]:
        """A context for each forward pass of training; backward passes run outside it.

        ``valid_mask``: True at positions (batch, seq_len) where the loss has a gradient; None: at all.
        """
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.observing(self.steps_done + 1, valid_mask))
            yield

    def begins_round(self, step: int) -> bool:
        """Does a round of refreshes take effect in ``step``?"""
        return any(group.begins_round(step) for group in self.groups)

    def state_dict(self) -> dict[str, Tensor]:
        """The state tensors themselves, not copies, and ``step``. Sharded state: this rank's pieces."""
        result = {_STEP: torch.tensor(self.steps_done)}
        for group in self.groups:
            for name, state in group.state.items():
                result |= {f"{name}.{key}": tensor for key, tensor in state.items()}
        return result

    def shards(self) -> dict[str, Shard]:
        """Which piece of the whole each state tensor of ``state_dict`` is."""
        result: dict[str, Shard] = {}
        for group in self.groups:
            result |= group.state_shards()
        return result

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], hint: str = _HINT) -> None:
        """Raises UserError and changes nothing if names, shapes or dtypes differ from ``state_dict``.

        ``hint``: the end of its sentence, what to do then.
        """
        own = self.state_dict()
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
        for group in self.groups:
            group.resume()

    def state_bytes(self) -> int:
        """Bytes of all optimizer state but the shared ``step``, on this rank."""
        return sum(group.state_bytes() for group in self.groups)

    def state_tensors(self) -> Iterator[Tensor]:
        """All tensors of the optimizer state on this rank."""
        for group in self.groups:
            for state in group.state.values():
                yield from state.values()

    def block_state_bytes(self) -> int:
        """Bytes of the state of attention and MLP weights; the rest has the same state for all methods."""
        return sum(group.state_bytes() for group in self.methods)

    @property
    def methods(self) -> list[ParamGroupOptimizer]:
        """The optimizers but those of the rest: of the run's own method, and of those of its groups."""
        own = self.parameter_groups.by_methods.keys()
        return [group for group in self.groups if group.parameters.keys() <= own]

    def metrics(self) -> dict[str, float]:
        """Metrics of the last refresh; waits for the device. The names of those of ``optimizer.groups[i]``
        end in ``/group_i``."""
        claimed = [own.keys() for own in self.parameter_groups.claimed]
        result: dict[str, float] = {}
        for group in self.groups:
            names = group.parameters.keys()
            end = f"/group_{claimed.index(names)}" if names in claimed else ""
            result |= {f"{key}{end}": value for key, value in group.metrics().items()}
        return result

    def table(self) -> list[GroupRow]:
        """The parameter groups: one row for each optimizer, one for frozen parameters."""
        methods = self.methods
        rows = []
        for group in self.groups:
            rows.append(
                GroupRow(
                    group=group.label,
                    pattern=" | ".join(group.config.block_parameters) if group in methods else "all others",
                    num_tensors=len(group.parameters),
                    num_elements=sum(p.numel() for p in group.parameters.values()),
                    lr=group.peak_lr,
                    rank=group.describe_rank(),
                    state_bytes=group.state_bytes(),
                )
            )
        if frozen := self.parameter_groups.frozen:
            elements = sum(p.numel() for p in frozen.values())
            shown = ", ".join([*list(frozen)[:3], *(["…"] if len(frozen) > 3 else [])])
            rows.append(GroupRow("frozen", shown, len(frozen), elements, None, "–", 0))
        return rows
