"""torch's Muon for the block linears, with eager state."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from rsotrain.optim.base import Part, Settings, gradient_of, work_dtype
from rsotrain.parallel.sharding import local

# torch.optim.Muon's defaults
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
NS_EPS = 1e-7


class Muon(Part):
    """Momentum orthogonalised by Newton-Schulz; the update's RMS is 0.2, so Adam's learning rates carry over.

    Bitwise ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` for float32 weights; for bfloat16 weights
    the momentum is float32 all the same. A sharded matrix is gathered on one rank, another for each of
    them, which orthogonalises it and sends the pieces back.
    """

    own_settings: ClassVar = ("momentum", "nesterov", "ns_steps")
    momentum: float
    nesterov: bool
    ns_steps: int

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        **own: Any,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, **own)
        for name, parameter in parameters.items():
            self.state[name] = {"momentum_buffer": self.keeper.zeros(local(parameter).shape, parameter)}

    def state_dim(self, name: str, key: str) -> int | None:
        return self.shards[name].dim

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        names = list(self.parameters)
        pieces = self.shards[names[0]].pieces
        for i in range(0, len(names), pieces):  # one matrix for each rank of those that share them
            wholes = [self._gathered(name, owner, step) for owner, name in enumerate(names[i : i + pieces])]
            updates = [None if w is None else self._orthogonalised(w) for w in wholes]
            for owner, (name, update) in enumerate(zip(names[i : i + pieces], updates, strict=True)):
                self._move(name, update, owner, lr)

    def _gathered(self, name: str, owner: int, step: int) -> Tensor | None:
        """Take the gradient into the momentum; what is to be orthogonalised, whole, on its owner only."""
        shard, parameter = self.shards[name], self.parameters[name]
        state = [self.state[name]["momentum_buffer"]]
        buffers = self.keeper.read(state)
        gradient = gradient_of(name, parameter).to(work_dtype(parameter.dtype))
        buffers[0].lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(buffers[0], self.momentum) if self.nesterov else buffers[0].clone()
        self.keeper.write(state, buffers, [f"{name}{shard.label}.momentum_buffer"], step)
        return shard.gather(update, owner)()

    def _orthogonalised(self, update: Tensor) -> Tensor:
        return _zeropower_via_newtonschulz(update, NS_COEFFICIENTS, self.ns_steps, NS_EPS)

    def _move(self, name: str, update: Tensor | None, owner: int, lr: float) -> None:
        own = local(self.parameters[name]).detach()
        # Newton-Schulz runs in, and returns, bfloat16
        piece = self.shards[name].scatter(update, owner, own.device, torch.bfloat16)
        weight = own.to(work_dtype(own.dtype))  # decay and update are rounded once
        weight.mul_(1 - lr * self.settings.weight_decay)
        weight.add_(piece, alpha=-_adjust_lr(lr, "match_rms_adamw", self.parameters[name].shape))
        if weight is not own:
            own.copy_(weight)
