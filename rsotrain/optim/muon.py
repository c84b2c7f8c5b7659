"""torch's Muon for the attention and MLP weights, with optimizer state created at construction."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from rsotrain.config.methods import OptimizerConfig
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.parallel.sharding import local

# torch.optim.Muon's defaults
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
NS_EPS = 1e-7


class Muon(ParamGroupOptimizer):
    """Momentum orthogonalised by Newton-Schulz. The update's RMS is 0.2, so Adam's learning rates carry over.

    For float32 weights it equals ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` bitwise. For bfloat16
    weights the momentum is still computed in float32. A sharded matrix is gathered on one rank, which
    orthogonalises it and sends the pieces back; the matrices take turns over the ranks.
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

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        order = list(names)
        pieces = self.shards[order[0]].pieces
        for i in range(0, len(order), pieces):  # one matrix for each of the ranks that share them
            turn = order[i : i + pieces]
            wholes = [self._gathered(name, owner, step) for owner, name in enumerate(turn)]
            updates = [None if w is None else self._orthogonalised(w) for w in wholes]
            for owner, (name, update) in enumerate(zip(turn, updates, strict=True)):
                self._move(name, update, owner, step, lr)

    def _gathered(self, name: str, owner: int, step: int) -> Tensor | None:
        """Update the momentum; return the whole matrix to orthogonalise on the rank ``owner``, else None."""
        shard, parameter = self.shards[name], self.parameters[name]
        momentum = self.config.momentum
        kept = [self.moments[name]["momentum_buffer"]]
        buffers = self.keeper.read(kept)
        gradient = gradient_of(name, parameter).to(work_dtype(parameter.dtype))
        buffers[0].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffers[0], momentum) if self.config.nesterov else buffers[0].clone()
        self.keeper.write(kept, buffers, step)
        return shard.gather(update, owner)()

    def _orthogonalised(self, update: Tensor) -> Tensor:
        return _zeropower_via_newtonschulz(update, NS_COEFFICIENTS, self.config.ns_steps, NS_EPS)

    def _move(self, name: str, update: Tensor | None, owner: int, step: int, lr: float) -> None:
        """Send the pieces of the orthogonalised ``update``, which the rank ``owner`` has, and apply them."""
        # Newton-Schulz runs in, and returns, bfloat16
        device = self.parameters[name].device
        piece = self.shards[name].scatter(update, owner, device, torch.bfloat16)
        self._apply(name, piece, step, lr)

    def _apply(self, name: str, update: Tensor, step: int, lr: float) -> None:
        """W ← (1 − ηλ)W − 0.2·√max(m, n)·η·update, rounded once."""
        own = local(self.parameters[name]).detach()
        weight = own.to(work_dtype(own.dtype))
        weight.mul_(1 - lr * self.decay_of(name))
        weight.add_(update, alpha=-_adjust_lr(lr, "match_rms_adamw", self.parameters[name].shape))
        if weight is not own:
            self.weights.store(name, weight, step)
