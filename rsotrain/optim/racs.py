"""RACS: gradient descent scaled by rows and columns (Gong et al., ICLR 2026, arXiv 2502.07752)."""

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import buckets, chosen
from rsotrain.optim.functional import inverse_root, limited_growth_
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.stacks import norms_of_each, products_with, put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.parallel.sharding import Shard, local, sums_of_rows

_MOMENTS = ("row_scale", "column_scale")


def row_and_column_scales(
    gradients: list[Tensor], shards: list[Shard], iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    """q and s of each G, such that q sᵀ approximates G² (elementwise): the paper's fixed point.

    From q = 1, ``iterations`` times: s ← (G²)ᵀq/‖q‖²;  q ← G²s/‖s‖². ``gradients``: this rank's rows; the
    sums over rows are all-reduced, n + 1 numbers an iteration for each matrix. G² is divided by its mean
    first, so that ‖s‖² does not underflow; that changes s alone, which is multiplied again. Gradients and
    results are stacks: (b, m, n), (b, m) and (b, n), each of matrices that its shard describes.
    """
    tiny = torch.finfo(gradients[0].dtype).tiny
    energies = sums_of_rows([g.square().sum((1, 2)).unsqueeze(1) for g in gradients], shards)
    means = [e.div_(math.prod(s.shape)).clamp_(min=tiny) for e, s in zip(energies, shards, strict=True)]
    squares = [(g * m.rsqrt().unsqueeze(2)).square_() for g, m in zip(gradients, means, strict=True)]
    rows = [torch.ones_like(g[..., 0]) for g in gradients]
    columns: list[Tensor] = []
    for _ in range(iterations):
        partial = [
            torch.cat([products_with(p.mT, q), q.square().sum(1, keepdim=True)], dim=1)
            for p, q in zip(squares, rows, strict=True)
        ]
        sums = sums_of_rows(partial, shards)
        columns = [total[:, :-1] / total[:, -1:].clamp(min=tiny) for total in sums]
        rows = [
            products_with(p, s) / s.square().sum(1, keepdim=True).clamp(min=tiny)
            for p, s in zip(squares, columns, strict=True)
        ]
    return rows, [s * mean for s, mean in zip(columns, means, strict=True)]


class Racs(ParamGroupOptimizer):
    """W ← (1 − ηλ)W − η·limit(diag(q)^-½ G diag(s)^-½), with averages of the scales q and s over steps.

    q ← βq + (1−β)q_t and s ← βs + (1−β)s_t, without bias correction. The limiter is Fira's, of the norm of
    the update. The paper's factor α is a part of the learning rate here.
    """

    by_rows: ClassVar = True
    replicated_state: ClassVar = frozenset({"update_norm"})

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
            rows, columns = local(parameter).shape
            self.add_moment(name, "row_scale", (rows,), self.shards[name].dim)
            self.add_moment(name, "column_scale", (columns,), None)
            self.add_tensor(name, "update_norm", torch.zeros((), device=parameter.device))
        if self.in_stacks:
            self.buckets = self.stacks
        else:  # by the sizes of whole matrices, so that all ranks have the same buckets
            self.buckets = buckets(parameters, lambda name: parameters[name].numel())

    def is_replicated(self, name: str, key: str) -> bool:
        return super().is_replicated(name, key) or key.startswith("column_scale")

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        rows, columns = matrix.piece
        return StateSize(((rows,), (columns,)), wide=1)

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        for bucket in chosen(self.buckets, names):
            self._update_bucket(bucket, step, self.peak_lr * lr_factor)

    def _update_bucket(self, names: list[str], step: int, lr: float) -> None:
        stacks = [names] if self.in_stacks else [[name] for name in names]
        shards = [self.shards[own[0]] for own in stacks]
        gradients = [stacked([gradient_of(name, self.parameters[name]) for name in own]) for own in stacks]
        gradients = [gradient.to(work_dtype(gradient.dtype)) for gradient in gradients]
        scales = row_and_column_scales(gradients, shards, self.config.iterations)
        updates = []
        for i, own in enumerate(stacks):
            roots = []
            for key, found in zip(_MOMENTS, scales, strict=True):
                kept = [self.moments[name][key] for name in own]
                wide = self.keeper.read(kept)
                averages = stacked(wide)
                averages.lerp_(found[i], 1.0 - self.config.scale_decay)
                roots.append(inverse_root(averages))
                put_back_(wide, averages)
                self.keeper.write(kept, wide, step)
            updates.append(gradients[i] * roots[0].unsqueeze(2) * roots[1].unsqueeze(1))
        squares = sums_of_rows([norms_of_each(update).square_() for update in updates], shards)
        for own, update, square in zip(stacks, updates, squares, strict=True):
            limits = [self.state[name]["update_norm"] for name in own]
            previous = stacked(limits)
            factors = limited_growth_(square.sqrt(), previous, self.config.max_growth)
            put_back_(limits, previous)
            self.apply_stack_(own, update.mul_(-factors.view(-1, 1, 1)), lr, step)
