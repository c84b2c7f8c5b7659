"""Lion: the sign of an interpolated momentum (Chen et al., NeurIPS 2023, arXiv 2302.06675)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rsotrain.optim.full_rank import FullRankOptimizer
from rsotrain.optim.functional import Betas
from rsotrain.optim.state_size import Shape


def lion_negative_update(gradient: Tensor, exp_avg: Tensor, betas: Betas) -> Tensor:
    """−sign(β₁M + (1−β₁)G), then M ← β₂M + (1−β₂)G (algorithm 2)."""
    update = exp_avg.lerp(gradient, 1.0 - betas[0]).sign_().neg_()
    exp_avg.lerp_(gradient, 1.0 - betas[1])
    return update


class Lion(FullRankOptimizer):
    """W ← (1 − ηλ)W − η sign(β₁M + (1−β₁)G);  M ← β₂M + (1−β₂)G."""

    row_local: ClassVar = True

    @classmethod
    def moment_shapes(cls, config: Any, name: str, piece: Shape) -> Mapping[str, Shape]:
        return {"exp_avg": piece}

    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        return lion_negative_update(gradient, moments[0], self.config.momentum)
