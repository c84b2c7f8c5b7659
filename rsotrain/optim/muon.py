"""torch's Muon for the attention and MLP weights, with optimizer state created at construction."""

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from rsotrain.config.methods import OptimizerConfig
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import chosen
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.stacks import norms_of_each, put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.parallel.sharding import local

# torch.optim.Muon's defaults
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
NS_EPS = 1e-7


def newton_schulz(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The orthogonalised matrix in ``dtype``; in bfloat16 by torch's own function."""
    if dtype is torch.bfloat16:
        return _zeropower_via_newtonschulz(matrix, NS_COEFFICIENTS, steps, NS_EPS)
    return newton_schulz_of_stack(matrix.unsqueeze(0), steps, dtype).squeeze(0)


def newton_schulz_of_stack(stack: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """The same of each of n matrices, (n, …): X ← aX + (bS + cS²)X with S = XXᵀ, from X/‖X‖.

    Of tall ones X ← aX + X(bS + cS²) with S = XᵀX, so that none is transposed.
    """
    a, b, c = NS_COEFFICIENTS
    norms = norms_of_each(stack).clamp_(min=NS_EPS).view(-1, 1, 1)
    x = torch.div(stack, norms, out=torch.empty(stack.shape, dtype=dtype, device=stack.device))
    is_tall = x.shape[1] > x.shape[2]
    for _ in range(steps):
        gram = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if is_tall else torch.baddbmm(x, factor, x, beta=a)
    return x


class Muon(ParamGroupOptimizer):
    """Momentum orthogonalised by Newton-Schulz. The update's RMS is 0.2, so Adam's learning rates carry over.

    For float32 weights it equals ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` bitwise, unless
    ``ns_dtype`` is float32. For bfloat16 weights the momentum is still computed in float32. A sharded matrix
    is gathered on one rank, which orthogonalises it and sends the pieces back; the matrices take turns over
    the ranks. On a GPU the matrices of one shape go through Newton-Schulz together.
    """

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        for name, parameter in parameters.items():
            self.add_moment(name, "momentum_buffer", local(parameter).shape, self.shards[name].dim)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return StateSize((matrix.piece,))

    @property
    def stack_itemsize(self) -> int:
        return self.ns_dtype.itemsize

    @cached_property
    def ns_dtype(self) -> torch.dtype:
        """Of Newton-Schulz, and of the updates that it gives."""
        return getattr(torch, self.config.ns_dtype.value)

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        for turn in self._turns(names):
            pieces = self.shards[turn[0]].pieces
            updates = [u for own in self._stacks_in(turn) for u in self._momenta(own, step)]
            wholes = [
                self._gathered(name, update, i % pieces)
                for i, (name, update) in enumerate(zip(turn, updates, strict=True))
            ]
            mine = iter(self._orthogonalised([whole for whole in wholes if whole is not None]))
            scattered = [
                self._scattered(name, None if whole is None else next(mine), i % pieces)
                for i, (name, whole) in enumerate(zip(turn, wholes, strict=True))
            ]
            for own in self._stacks_in(turn):
                self._move(own, stacked(scattered[: len(own)]), step, lr)
                del scattered[: len(own)]

    def _turns(self, names: Collection[str]) -> list[list[str]]:
        """The matrices that are orthogonalised at a time: one for each of the ranks, or a stack."""
        if self.in_stacks:
            return chosen(self.stacks, names)
        order = list(names)
        pieces = self.shards[order[0]].pieces
        return [order[i : i + pieces] for i in range(0, len(order), pieces)]

    def _stacks_in(self, turn: list[str]) -> list[list[str]]:
        return [turn] if self.in_stacks else [[name] for name in turn]

    def _momenta(self, names: list[str], step: int) -> list[Tensor]:
        """Update the momentum of a stack; return this rank's pieces of what is to be orthogonalised."""
        momentum = self.config.momentum
        kept = [self.moments[name]["momentum_buffer"] for name in names]
        wide = self.keeper.read(kept)
        buffers, gradients = stacked(wide), self._gradients_of(names)
        buffers.lerp_(gradients, 1 - momentum)
        updates = gradients.lerp(buffers, momentum) if self.config.nesterov else buffers.clone()
        put_back_(wide, buffers)
        self.keeper.write(kept, wide, step)
        return list(updates.unbind())

    def _gradients_of(self, names: list[str]) -> Tensor:
        """This rank's pieces, (n, …), in at least float32."""
        gradients = stacked([gradient_of(name, self.parameters[name]) for name in names])
        return gradients.to(work_dtype(gradients.dtype))

    def _gathered(self, name: str, piece: Tensor, owner: int) -> Tensor | None:
        """The whole matrix on the rank ``owner``, else None."""
        return self.shards[name].gather(piece, owner)()

    def _orthogonalised(self, matrices: list[Tensor]) -> list[Tensor]:
        """In ``ns_dtype``; on a GPU all have one shape."""
        steps = self.config.ns_steps
        if not matrices or not self.in_stacks:
            return [newton_schulz(matrix, steps, self.ns_dtype) for matrix in matrices]
        return list(newton_schulz_of_stack(stacked(matrices), steps, self.ns_dtype).unbind())

    def _scattered(self, name: str, update: Tensor | None, owner: int) -> Tensor:
        """This rank's piece of what the rank ``owner`` has."""
        return self.shards[name].scatter(update, owner, self.parameters[name].device, self.ns_dtype)

    def _move(self, names: list[str], updates: Tensor, step: int, lr: float) -> None:
        """W ← (1 − ηλ)W − 0.2·√max(m, n)·η·update, rounded once; ``updates``: orthogonalised, (n, …)."""
        rate = -_adjust_lr(lr, "match_rms_adamw", self.parameters[names[0]].shape)
        kept = 1 - lr * self.decay_of(names[0])
        if self.in_stacks:
            self.weights.move_all_(names, list(updates.contiguous().unbind()), rate, step, kept=kept)
            return
        (name,) = names
        own = local(self.parameters[name]).detach()
        weight = own.to(work_dtype(own.dtype))
        weight.mul_(kept)
        weight.add_(updates[0], alpha=rate)
        if weight is not own:
            self.weights.store(name, weight, step)
