"""SCALE: normalised gradient descent with momentum in the last layer (ICML 2026, arXiv 2506.16659)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsotrain.optim.full_rank import FullRankOptimizer
from rsotrain.optim.state_size import Shape


def normalised_rows(gradient: Tensor, eps: float) -> Tensor:
    """−G with each row divided by its root mean square, at least ``eps``. ``gradient``: m×n."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return gradient / norms.mul_(gradient.shape[1] ** -0.5).clamp_(min=eps).neg_()


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


class Scale(FullRankOptimizer):
    """U = G/RMS(G), row by row; of the head M/RMS(M) with M ← μM + (1−μ)G; of the embedding column by column.

    W ← (1 − ηλ)W − ηU. A row of a linear is what one output sees of the input, of the embedding one token's
    vector; the paper's W is transposed and its columns are these rows. A head that is tied to the embedding
    is the embedding: its columns are normalised, and there is no momentum.
    """

    by_rows: ClassVar = True
    row_local: ClassVar = True

    @classmethod
    def moment_shapes(cls, config: Any, name: str, piece: Shape) -> Mapping[str, Shape]:
        return {"exp_avg": piece} if _matches(config.momentum_parameters, name) else {}

    def whole(self, name: str) -> bool:
        return _matches(self.config.column_parameters, name)

    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        if moments:
            gradient = moments[0].lerp_(gradient, 1.0 - self.config.momentum)
        if not self.whole(name):
            return normalised_rows(gradient, self.settings.eps)
        shard = self.shards[name]
        squares = shard.sum_(torch.linalg.vector_norm(gradient, dim=0).square_())
        return gradient / squares.div_(shard.shape[0]).sqrt_().clamp_(min=self.settings.eps).neg_()
