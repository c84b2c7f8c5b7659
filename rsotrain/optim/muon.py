"""torch's Muon for the block linears, with eager state."""

from typing import ClassVar

import torch
from torch import nn
from torch.optim._muon import muon

from rsotrain.optim.base import Part, Settings, gradient_of, work_dtype

# torch.optim.Muon's defaults
NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
NS_EPS = 1e-7


class Muon(Part):
    """Momentum orthogonalised by Newton-Schulz; the update's RMS is 0.2, so Adam's learning rates carry over.

    Bitwise ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` for float32 weights; for bfloat16 weights
    the momentum is float32 all the same.
    """

    own_settings: ClassVar = ("momentum", "nesterov", "ns_steps")

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        *,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings)
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        for name, parameter in parameters.items():
            self.state[name] = {"momentum_buffer": self.keeper.zeros(parameter.shape, parameter)}

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        for name, parameter in self.parameters.items():
            state = [self.state[name]["momentum_buffer"]]
            buffers = self.keeper.read(state)
            gradient = gradient_of(name, parameter).to(work_dtype(parameter.dtype))
            weight = parameter.data.to(gradient.dtype)  # decay and update are rounded once
            muon(
                [weight],
                [gradient],
                buffers,
                lr=self.peak_lr * lr_factor,
                weight_decay=self.settings.weight_decay,
                momentum=self.momentum,
                nesterov=self.nesterov,
                ns_coefficients=NS_COEFFICIENTS,
                ns_steps=self.ns_steps,
                eps=NS_EPS,
                adjust_lr_fn="match_rms_adamw",
                has_complex=False,
            )
            if weight is not parameter.data:
                parameter.data.copy_(weight)
            self.keeper.write(state, buffers, [f"{name}.momentum_buffer"], step)
