"""ORBIT: Adam in a tracked subspace, the rest of the gradient orthogonalised; this project's own method."""

from torch import Tensor

from rsotrain.optim.base import buckets
from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix
from rsotrain.optim.orthogonal import orthogonal_groups, rows_of_group
from rsotrain.optim.residuals import rounding_noise
from rsotrain.subspace.projection import add_lifted_, oriented


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
        # residuals are larger than what the buckets were made for
        for part in buckets(own, lambda item: max(item[0].shard.shape) * item[0].size):
            whole = [item for item in part if item[0].rank == item[0].size]
            for m, _, _, update in whole:
                self.apply_lifted_(m.name, update, self.basis(m), lr, step, m.side)
            cut = [item for item in part if item[0].rank < item[0].size]
            residuals = [self._residual(m, a, r) for m, a, r, _ in cut]
            outside = self._orthogonal([m for m, *_ in cut], residuals)
            for (m, _, _, update), o in zip(cut, outside, strict=True):
                size = self.config.free_scale * m.size**0.5
                add_lifted_(o, update, self.basis(m), 1.0, decay_factor=-size)
                self.apply_(m.name, o, lr, step, m.side)

    def _residual(self, matrix: Matrix, gradient: Tensor, projected: Tensor) -> Tensor:
        """A − lift(R), this rank's piece, in the dtype of products, without rows of mere rounding errors."""
        basis = self.basis(matrix)
        residual = gradient.to(basis.dtype, copy=True)
        add_lifted_(residual, projected, basis, -1.0)
        dtype = projected.dtype
        coarser = min(gradient.dtype, basis.dtype, key=lambda each: each.itemsize)
        noise = matrix.row_norms(gradient, dtype).mul_(rounding_noise(matrix.size, coarser))
        return residual.mul_(matrix.row_norms(residual, dtype) > noise)

    def _orthogonal(self, matrices: list[Matrix], residuals: list[Tensor]) -> list[Tensor]:
        """O of each, this rank's pieces."""
        rows = [rows_of_group(self.config.group, m.size) for m in matrices]
        apart = [
            m.shard.dim is None or (not m.by_columns and m.shard.chunk % n == 0)
            for m, n in zip(matrices, rows, strict=True)
        ]
        pieces = [
            residual if alone else oriented(m.shard.all_gather(oriented(residual, m.side)), m.side)
            for m, residual, alone in zip(matrices, residuals, apart, strict=True)
        ]
        found = orthogonal_groups(pieces, rows, self.config.ns_steps)
        return [
            o if alone else oriented(m.shard.of(oriented(o, m.side)), m.side)
            for m, o, alone in zip(matrices, found, apart, strict=True)
        ]
