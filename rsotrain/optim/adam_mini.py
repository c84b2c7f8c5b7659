"""Adam-mini: one second moment for a row or a head (Zhang et al., ICLR 2025, arXiv 2406.16793)."""

import re
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.errors import require
from rsotrain.optim.base import ParamGroupOptimizer, Settings
from rsotrain.optim.full_rank import FullRankOptimizer
from rsotrain.optim.functional import Betas
from rsotrain.optim.state_size import Shape
from rsotrain.parallel.sharding import Shard, local


def mean_squares(gradient: Tensor) -> Tensor:
    """The mean of G² over each row, m×1."""
    return torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square_().div_(gradient.shape[1])


def means_of_heads(of_rows: Tensor, number: int, shard: Shard, head_size: int) -> Tensor:
    """Each row's entry of ``of_rows`` replaced by the mean over its head's rows.

    ``of_rows``: n·m×1, the rows (there may be none) that this rank has of n = ``number`` matrices, which are
    laid out as ``shard`` says.
    """
    start, stop = (0, shard.shape[0]) if shard.dim is None else (shard.start, shard.stop)
    heads = torch.arange(start, stop, device=of_rows.device) // head_size
    by_matrix = of_rows.view(number, len(heads), 1)
    sums = of_rows.new_zeros(number, shard.shape[0] // head_size, 1).index_add_(1, heads, by_matrix)
    return shard.sum_(sums).div_(head_size)[:, heads].view(of_rows.shape)


def adam_mini_negative_update(
    gradient: Tensor,
    exp_avg: Tensor,
    block_sq: Tensor,
    squares: Tensor,
    *,
    step: int,
    betas: Betas,
    eps: float,
) -> Tensor:
    """M ← β₁M + (1−β₁)G;  v ← β₂v + (1−β₂)·mean(G²);  returns −(M/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε).

    ``gradient``, ``exp_avg``: m×n; ``block_sq``: v of each row, m×1; ``squares``: the means, m×1.
    """
    exp_avg.lerp_(gradient, 1.0 - betas[0])
    block_sq.lerp_(squares, 1.0 - betas[1])
    denominators = block_sq.div(1.0 - betas[1] ** step).sqrt_().add_(eps)
    return exp_avg / denominators.mul_(betas[0] ** step - 1.0)


class AdamMini(FullRankOptimizer):
    """Adam whose second moment is one number for each row (an output), for queries and keys for each head.

    The rows of a head have equal numbers, which are kept for each of them. W ← (1 − ηλ)W − ηN. A head whose
    rows are on several ranks has its mean summed over them, a number for each head.
    """

    by_rows: ClassVar = True
    row_local: ClassVar = True

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        self.head_sizes: dict[str, int] = {}
        for pattern in self.config.head_parameters:
            found = [name for name in parameters if re.search(pattern, name)]
            require(
                bool(found),
                f"optimizer.head_parameters: {pattern!r} matches none of the matrices that"
                " optimizer.block_parameters finds; remove or correct it",
            )
            for name in found:
                rows, columns = self.shards[name].shape
                size, remainder = divmod(columns, self.config.num_heads)
                require(
                    size > 0 and remainder == 0 and rows % size == 0,
                    f"optimizer.num_heads={self.config.num_heads} does not divide {name} ({rows} x"
                    f" {columns}) into heads; give the number of the model's query heads",
                )
                self.head_sizes[name] = size

    @classmethod
    def moment_shapes(cls, config: Any, name: str, piece: Shape) -> Mapping[str, Shape]:
        return {"exp_avg": piece, "block_sq": (piece[0], 1)}

    def whole(self, name: str) -> bool:
        return name in self.head_sizes

    def stack_kind(self, name: str) -> Hashable:
        return ParamGroupOptimizer.stack_kind(self, name), self.head_sizes.get(name)

    def _number(self, name: str, rows: int) -> int:
        """Of the matrices that have so many rows on this rank together, of which ``name`` is the first."""
        own = len(local(self.parameters[name]))
        if own or not self.in_stacks:
            return rows // own if own else 1
        return next(len(stack) for stack in self.stacks if stack[0] == name)

    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        squares = mean_squares(gradient)
        if name in self.head_sizes:
            squares = means_of_heads(
                squares, self._number(name, len(gradient)), self.shards[name], self.head_sizes[name]
            )
        exp_avg, block_sq = moments
        return adam_mini_negative_update(
            gradient,
            exp_avg,
            block_sq,
            squares,
            step=step,
            betas=self.settings.betas,
            eps=self.settings.eps,
        )
