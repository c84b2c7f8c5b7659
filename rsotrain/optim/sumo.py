"""SUMO: momentum orthogonalised in a subspace (Refael et al., NeurIPS 2025, arXiv 2505.24749)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from rsotrain.optim.inverse_roots import inverse_roots
from rsotrain.optim.matrix import Matrix, grams_of_rows
from rsotrain.optim.stacks import products
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.subspace_optimizer import SubspaceOptimizer
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import resolve_rank

UPDATE_RMS = 0.2  # of Adam's updates, as Muon's rule for rates has it


class Sumo(SubspaceOptimizer):
    """M ← μM + (1−μ)R;  W ← (1 − ηλ)W − 0.2·√max(m, n)·η·lift(O), O = M(MᵀM)^-½.

    O is the orthonormal matrix nearest to M. The paper takes it from an SVD. The eigenvectors of MᵀM in
    float64 give the same to the precision of float32, and where M is sharded by rows only r×r numbers are
    summed over ranks. A refresh transports M as in the paper, keeps or zeros it. The limiter of the paper is
    left out: ‖O‖_F is √r in every step. On a GPU (MᵀM)^-½ comes of products alone, in float64, too.
    """

    needs_orthonormal: ClassVar = True

    def add_state(self, matrix: Matrix) -> None:
        self.add_moment(matrix.name, "exp_avg", (matrix.num_rows, matrix.rank), matrix.rows_dim)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        rank = resolve_rank(config.rank, matrix.size, matrix.name)
        return StateSize(((matrix.rows, rank),), ((matrix.size, rank),))

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        self.momentum_changed(matrix, change, step)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        moments = [self.moments[m.name]["exp_avg"] for m in bucket]
        wide = self.keeper.read(moments)
        torch._foreach_lerp_(wide, projected, 1.0 - self.config.momentum)
        doubles = [
            own for stack in self.stacks_in(bucket, wide) for own in stack.tensors[0].double().unbind()
        ]
        roots = inverse_roots(grams_of_rows(bucket, doubles))
        for stack in self.stacks_in(bucket, doubles, roots):
            exp_avg, root = stack.tensors
            size = -UPDATE_RMS * max(stack.first.shard.shape) ** 0.5
            update = products(exp_avg, root).mul_(size).to(wide[0].dtype)
            self.apply_lifted_to(stack, update, lr, step)
        self.keeper.write(moments, wide, step)
