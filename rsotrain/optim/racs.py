"""RACS: gradient descent scaled by rows and columns (Gong et al., ICLR 2026, arXiv 2502.07752)."""

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import buckets, chosen
from rsotrain.optim.functional import allowed_norms
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.stacks import grams_of, norms_of_each, product_in, products_with, put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.parallel.sharding import Shard, local, sums_of_rows

_MOMENTS = ("row_scale", "column_scale")
_LARGEST = 1e15  # of u, so that products with the next one, which is √(mn) times as large, are float32
_LEAST = 1e-33  # whose inverse is one, times any number of rows


def row_and_column_scales(
    gradients: list[Tensor], shards: list[Shard], iterations: int, unit: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """q and s of each G, such that q sᵀ approximates G² (elementwise): the paper's fixed point.

    From q = 1, ``iterations`` times: s ← (G²)ᵀq/‖q‖²;  q ← G²s/‖s‖². ``gradients``: this rank's rows; the
    sums over rows are all-reduced, n numbers an iteration for each matrix. Gradients and results are stacks:
    (b, m, n), (b, m) and (b, n), each of matrices that its shard describes. ``unit``: 1, best in
    the dtype of gradients, 1×1.

    That is a power iteration on P = G²/ΣG², v ← Pᵀu and u ← √(mn)·Pv, with q = αu for an α that is known
    from all u at the end, since ⟨q_i, q_i+1⟩ = ‖q_i‖². √(mn) keeps the factor of an iteration between
    (mn)^-½, for a matrix of equal entries, and (mn)^½, for one with a single entry; v is divided by its sum
    before ‖u‖² can leave the range of float32. P, u and v of bfloat16 gradients are in bfloat16.
    """
    wide = work_dtype(gradients[0].dtype)
    tiny = torch.finfo(wide).tiny
    squares = [g.square() for g in gradients]
    energies = sums_of_rows([p.sum((1, 2), dtype=wide).unsqueeze(1) for p in squares], shards)
    for p, energy in zip(squares, energies, strict=True):
        p.div_(energy.clamp_(min=tiny).unsqueeze(2))
    scales = [math.prod(shard.shape) ** 0.5 for shard in shards]
    found = [[unit.to(p.dtype).expand(p.shape[:2])] for p in squares]  # all u
    columns = sums_of_rows([p.sum(1) for p in squares], shards)
    grown = 1.0
    for i in range(iterations):
        if i:
            partial = [products_with(p.mT, us[-1]) for p, us in zip(squares, found, strict=True)]
            columns = sums_of_rows(partial, shards)
        grown *= max(scales)
        if grown > _LARGEST and i < iterations - 1:
            columns = [v / v.sum(1, keepdim=True).clamp_(min=tiny) for v in columns]
            grown = max(scales)
        for p, v, us, scale in zip(squares, columns, found, scales, strict=True):
            us.append(products_with(p, v, scale))
    grams = sums_of_rows([grams_of(torch.stack(us, dim=1)) for us in found], shards)
    rows_and_columns = []
    for gram, energy, v, us in zip(grams, energies, columns, found, strict=True):
        following = gram.clamp_(min=_LEAST).diagonal(1, 1, 2)
        # a scan, as products of neighbours stay within the range of float32
        alpha = (gram.diagonal(0, 1, 2)[:, :-1] / following).cumprod(1)[:, -1:]
        # the last s is v/‖q‖², and α‖u_i‖² = α_i+1⟨u_i, u_i+1⟩
        rows_and_columns.append((us[-1] * alpha, v * (energy / (alpha * following[:, -1:]))))
    return [q for q, _ in rows_and_columns], [s for _, s in rows_and_columns]


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

    @property
    def stack_itemsize(self) -> int:
        return next(iter(self.parameters.values())).dtype.itemsize

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        parts = chosen(self.buckets, names)
        limits = [self.state[name]["update_norm"] for part in parts for name in part]
        allowed = allowed_norms(torch.stack(limits), self.config.max_growth)
        norms = []
        for part, own in zip(parts, allowed.split([len(part) for part in parts]), strict=True):
            norms += self._update_bucket(part, own, step, self.peak_lr * lr_factor)
        torch._foreach_copy_(limits, list(torch.minimum(torch.cat(norms), allowed).unbind()))

    @cached_property
    def unit(self) -> Tensor:
        dtype = next(iter(self.parameters.values())).dtype
        return self.one.view(1, 1).to(dtype if self.in_stacks else work_dtype(dtype))

    def _update_bucket(self, names: list[str], allowed: Tensor, step: int, lr: float) -> list[Tensor]:
        """Returns the norms of the updates. ``allowed``: those up to which they may grow."""
        stacks = [names] if self.in_stacks else [[name] for name in names]
        shards = [self.shards[own[0]] for own in stacks]
        gradients = [stacked([gradient_of(name, self.parameters[name]) for name in own]) for own in stacks]
        if not self.in_stacks:
            gradients = [gradient.to(work_dtype(gradient.dtype)) for gradient in gradients]
        scales = row_and_column_scales(gradients, shards, self.config.iterations, self.unit)
        updates = []
        for gradient, own, *found in zip(gradients, stacks, *scales, strict=True):
            kept = [self.moments[name][key] for key in _MOMENTS for name in own]
            wide = self.keeper.read(kept)
            averages = [stacked(wide[: len(own)]), stacked(wide[len(own) :])]
            torch._foreach_lerp_(averages, found, 1.0 - self.config.scale_decay)
            roots = torch._foreach_rsqrt(averages)
            # not infinite for rows whose gradients have all been 0
            torch._foreach_clamp_max_(roots, torch.finfo(roots[0].dtype).max)
            put_back_(wide[: len(own)], averages[0])
            put_back_(wide[len(own) :], averages[1])
            self.keeper.write(kept, wide, step)
            update = product_in(gradient.dtype, gradient, roots[0].unsqueeze(2))
            updates.append(update.mul_(roots[1].unsqueeze(1)))
        norms = [norms_of_each(update) for update in updates]
        if shards[0].dim is not None:
            norms = [square.sqrt_() for square in sums_of_rows([n.square_() for n in norms], shards)]
        lengths = [len(own) for own in stacks]
        for own, update, norm, most in zip(stacks, updates, norms, allowed.split(lengths), strict=True):
            factors = (most / norm).clamp_(max=1.0).view(-1, 1, 1)
            self.apply_stack_(own, update.mul_(factors), lr, step, scale=-1.0)
        return norms
