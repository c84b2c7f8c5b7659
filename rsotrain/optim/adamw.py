"""AdamW at full rank."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsotrain.optim.base import Part, Settings, buckets, gradient_of, work_dtype
from rsotrain.optim.functional import fused_adamw_
from rsotrain.parallel.sharding import local

# Elements that are widened at a time: 4 MiB of float32 each for weight and gradient, to stay in the cache
PIECE_ELEMENTS = 1 << 20


@dataclass
class _Piece:
    """A run of elements of one parameter, flat; all but ``gradient`` are views to write to."""

    label: str
    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamW(Part):
    """AdamW with decoupled weight decay; in float32 bitwise ``torch.optim.AdamW(fused=True)``.

    The fused kernel takes one dtype, so bfloat16 weights, their gradients and bfloat16 moments pass
    through float32 copies, a cache's worth at a time; bfloat16 weights are then rounded to nearest, as in
    the papers' pure bfloat16 runs.
    """

    def __init__(
        self, label: str, parameters: dict[str, nn.Parameter], peak_lr: float, settings: Settings
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings)
        for name, parameter in parameters.items():
            shape = local(parameter).shape
            self.state[name] = {
                "exp_avg": self.keeper.zeros(shape, parameter),
                "exp_avg_sq": self.keeper.zeros(shape, parameter),
            }

    def state_dim(self, name: str, key: str) -> int | None:
        return self.shards[name].dim

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        # the kernel works on lists of one dtype and device
        kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, parameter in self.parameters.items():
            kinds.setdefault((parameter.dtype, parameter.device), []).append(name)
        for (dtype, device), names in kinds.items():
            count = torch.full((), float(step), device=device)  # no copy that waits
            copies = dtype is not work_dtype(dtype) or self.keeper.dtype is torch.bfloat16
            limit = PIECE_ELEMENTS if copies else None
            pieces = [piece for name in names for piece in self._pieces(name, limit)]
            groups = buckets(pieces, lambda p: p.weight.numel(), limit) if limit else [pieces]
            for group in groups:
                self._update_group(group, count, step, self.peak_lr * lr_factor)

    def _pieces(self, name: str, limit: int | None) -> list[_Piece]:
        parameter, state = self.parameters[name], self.state[name]
        weight = local(parameter).detach()
        tensors = (weight, gradient_of(name, parameter), state["exp_avg"], state["exp_avg_sq"])
        if limit is None:
            return [_Piece(name, *tensors)]
        assert weight.is_contiguous(), "its flat view must write to it"
        flat = [t.reshape(-1).split(limit) for t in tensors]
        label = f"{name}{self.shards[name].label}"
        return [_Piece(f"{label}:{i}", *run) for i, run in enumerate(zip(*flat, strict=True))]

    def _update_group(self, pieces: list[_Piece], count: Tensor, step: int, lr: float) -> None:
        weights = [p.weight for p in pieces]
        wide = work_dtype(weights[0].dtype)
        moments = [p.exp_avg for p in pieces] + [p.exp_avg_sq for p in pieces]
        wide_weights = [w.to(wide) for w in weights]
        wide_moments = self.keeper.read(moments)
        fused_adamw_(
            wide_weights,
            [p.gradient.to(wide) for p in pieces],
            wide_moments[: len(pieces)],
            wide_moments[len(pieces) :],
            [count] * len(pieces),
            lr=lr,
            betas=self.settings.betas,
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
        )
        if wide is not weights[0].dtype:
            torch._foreach_copy_(weights, wide_weights)
        labels = [f"{p.label}.{kind}" for kind in ("exp_avg", "exp_avg_sq") for p in pieces]
        self.keeper.write(moments, wide_moments, labels, step)
