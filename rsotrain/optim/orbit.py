"""ORBIT: Adam in a tracked subspace, the rest of the gradient orthogonalised; this project's own method."""

import torch
from torch import Tensor

from rsotrain.optim.buckets import buckets
from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix
from rsotrain.optim.orthogonal import orthogonal_groups, orthogonal_groups_of_stack, rows_of_group
from rsotrain.optim.residuals import rounding_noise
from rsotrain.optim.stacks import add_lifted_
from rsotrain.optim.subspace_optimizer import Stack
from rsotrain.subspace.projection import oriented


class Orbit(GaLore):
    """W ← (1 − ηλ)W − η (lift(N) + f·√k·O), N Adam's update of R = A Q and O of the residual A − lift(R).

    O is the residual whose rows, in groups of ``group`` neighbours, are made orthonormal by Newton-Schulz
    steps, so that √k·O has entries of about 1, as N has; f = ``free_scale``. The residual has neither
    momentum nor state. Rows of it that are no larger than rounding errors count as 0. At full rank there is
    no residual.

    A rank that has whole groups of rows needs nothing from the others. Where the ranks cut groups, or share
    the columns, the residual is gathered in the dtype of the products.
    """

    needs_orthonormal = True

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        updates = self.negative_updates(bucket, projected, step)
        own = list(zip(bucket, gradients, projected, updates, strict=True))
        # residuals are larger than what a CPU's buckets were made for
        elements = (lambda _: 0) if self.in_stacks else (lambda item: max(item[0].shard.shape) * item[0].size)
        for part in buckets(own, elements):
            whole = [item for item in part if item[0].rank == item[0].size]
            for stack in self.stacks_in([m for m, *_ in whole], [update for *_, update in whole]):
                self.apply_lifted_to(stack, stack.tensors[0], lr, step)
            cut = [item for item in part if item[0].rank < item[0].size]
            matrices = [m for m, *_ in cut]
            stacks = self.stacks_in(matrices, [a for _, a, _, _ in cut], [r for _, _, r, _ in cut])
            outside = [o for stack in stacks for o in self._of_stack(stack)] if self.in_stacks else []
            if not self.in_stacks:
                residuals = [self._without_noise(s.first, *self._residual(s))[0] for s in stacks]
                outside = self._orthogonal(matrices, residuals)
            for stack in self.stacks_in(matrices, outside, [update for *_, update in cut]):
                o, update = stack.tensors
                size = self.config.free_scale * stack.first.size**0.5
                add_lifted_(o, update, stack.basis, 1.0, decay_factor=-size)
                self.apply_to(stack, o, lr, step)

    def _residual(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """A − lift(R), this rank's pieces, in the dtype of products; row norms of mere rounding errors."""
        (gradients, projected), first = stack.tensors, stack.first
        coarser = min(gradients.dtype, stack.basis.dtype, key=lambda each: each.itemsize)
        inside = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
        noise = inside.mul_(rounding_noise(first.size, coarser))
        return self.residual_of(stack, gradients, projected), noise

    def _without_noise(self, first: Matrix, residual: Tensor, noise: Tensor) -> Tensor:
        """The residual with 0 for rows that are no larger than ``noise``."""
        return residual.mul_(first.row_norms(residual, noise.dtype) > noise)

    def _is_apart(self, matrix: Matrix) -> bool:
        """Has this rank whole groups of rows?"""
        shard, rows = matrix.shard, rows_of_group(self.config.group, matrix.size)
        return shard.dim is None or (not matrix.by_columns and shard.chunk % rows == 0)

    def _of_stack(self, stack: Stack) -> list[Tensor]:
        """O of each, this rank's pieces, on a GPU."""
        first, (residual, noise) = stack.first, self._residual(stack)
        if not self._is_apart(first):
            return self._orthogonal(
                stack.matrices, list(self._without_noise(first, residual, noise).unbind())
            )
        rows = rows_of_group(self.config.group, first.size)
        return list(
            orthogonal_groups_of_stack(residual, noise, self.one, rows, self.config.ns_steps).unbind()
        )

    def _orthogonal(self, matrices: list[Matrix], residuals: list[Tensor]) -> list[Tensor]:
        """O of each, this rank's pieces."""
        rows = [rows_of_group(self.config.group, m.size) for m in matrices]
        apart = [self._is_apart(m) for m in matrices]
        pieces = [
            residual if alone else oriented(m.shard.all_gather(oriented(residual, m.side)), m.side)
            for m, residual, alone in zip(matrices, residuals, apart, strict=True)
        ]
        found = orthogonal_groups(pieces, rows, self.config.ns_steps)
        return [
            o if alone else oriented(m.shard.of(oriented(o, m.side)), m.side)
            for m, o, alone in zip(matrices, found, apart, strict=True)
        ]
