"""FOAM: Adam on blocks of neighbouring entries, with the residual of the gradient (arXiv 2512.07112)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rsotrain.optim.full_rank import FullRankOptimizer
from rsotrain.optim.functional import Betas
from rsotrain.optim.state_size import Shape


def foam_negative_update(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, block: int, step: int, betas: Betas, eps: float
) -> Tensor:
    """−Û/(1−β₁ᵗ) / (√(V̂/(1−β₂ᵗ)) + ε) with Û = unfold(m̃) + R and V̂ = unfold(ṽ) + R².

    g̃ is the mean of each block of neighbours in a row and R = G − unfold(g̃) the residual;
    m̃ ← β₁m̃ + (1−β₁)g̃;  ṽ ← β₂ṽ + (1−β₂)·mean(G²), the mean of the squares, as in the authors' code (their
    text squares the mean). ``gradient``: G, m×n of any dtype; ``exp_avg``, ``exp_avg_sq``: m̃ and ṽ,
    m×⌈n/block⌉, updated in place. A last block that is not full is filled with zeros.
    """
    columns = gradient.shape[1]
    if padding := -columns % block:
        gradient = functional.pad(gradient, (0, padding))
    # block × m × n/block: what is folded comes first, so that all that follows runs over contiguous memory
    folded = gradient.unflatten(1, (-1, block)).movedim(2, 0)
    neighbours = torch.empty(folded.shape, dtype=exp_avg.dtype, device=gradient.device).copy_(folded)
    mean = neighbours.mean(0)
    exp_avg.lerp_(mean, 1.0 - betas[0])
    residual = neighbours.sub_(mean)
    squares = residual.square()
    exp_avg_sq.lerp_(squares.mean(0).addcmul_(mean, mean), 1.0 - betas[1])  # mean(G²) = mean(R²) + g̃²
    correction2 = (1.0 - betas[1] ** step) ** 0.5
    denominator = squares.add_(exp_avg_sq).sqrt_().add_(eps * correction2)
    update = residual.add_(exp_avg).div_(denominator).mul_(-correction2 / (1.0 - betas[0] ** step))
    return update.movedim(0, 2).flatten(1)[:, :columns]


class Foam(FullRankOptimizer):
    """Adam's moments for blocks of 2^``level`` neighbours in a row; level 0 is Adam.

    ε is outside the bias correction, as in Adam; the authors' code has it inside.
    """

    by_rows: ClassVar = True
    row_local: ClassVar = True
    widens: ClassVar = False  # where blocks are brought together

    @classmethod
    def moment_shapes(cls, config: Any, name: str, piece: Shape) -> Mapping[str, Shape]:
        folded = (piece[0], -(-piece[1] // 2**config.level))
        return {"exp_avg": folded, "exp_avg_sq": folded}

    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return foam_negative_update(
            gradient,
            *moments,
            block=2**self.config.level,
            step=step,
            betas=self.settings.betas,
            eps=self.settings.eps,
        )
