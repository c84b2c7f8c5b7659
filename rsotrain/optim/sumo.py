"""SUMO: momentum orthogonalised in a subspace (Refael et al., NeurIPS 2025, arXiv 2505.24749)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsotrain.optim.inverse_roots import inverse_roots
from rsotrain.optim.matrix import Matrix, grams_of_rows
from rsotrain.optim.moments import Moment, Wide
from rsotrain.optim.stacks import STACK_BYTES, products
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.subspace_optimizer import SubspaceOptimizer
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import resolve_rank

UPDATE_RMS = 0.2  # of Adam's updates, as Muon's rule for rates has it

# Bytes of (MᵀM)^-½ that a GPU finds together: a few kernels each, whatever the number of matrices. Four or
# five temporaries of that size are alive at a time.
ROOT_BYTES = STACK_BYTES // 2


@dataclass(frozen=True)
class _Waiting:
    """Matrices whose momenta are updated and whose weights are not. ``grams``: MᵀM (r×r, float64) of each."""

    bucket: list[Matrix]
    moments: list[Moment]
    wide: Wide
    grams: list[Tensor]

    @property
    def rank(self) -> int:
        return self.bucket[0].rank

    @property
    def bytes(self) -> int:
        return sum(gram.nbytes for gram in self.grams)

    @property
    def takes_no_memory(self) -> bool:
        """Are the momenta those of the state themselves, no copies in float32?"""
        return all(value is moment.values for value, moment in zip(self.wide, self.moments, strict=True))


class Sumo(SubspaceOptimizer):
    """M ← μM + (1−μ)R;  W ← (1 − ηλ)W − 0.2·√max(m, n)·η·lift(O), O = M(MᵀM)^-½.

    O is the orthonormal matrix nearest to M. The paper takes it from an SVD. The eigenvectors of MᵀM in
    float64 give the same to the precision of float32, and where M is sharded by rows only r×r numbers are
    summed over ranks. A refresh transports M as in the paper, keeps or zeros it. The limiter of the paper is
    left out: ‖O‖_F is √r in every step. On a GPU (MᵀM)^-½ comes of products alone, in float64, too.
    """

    needs_orthonormal: ClassVar = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._waiting: list[_Waiting] = []

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
        waiting = _Waiting(bucket, moments, wide, grams_of_rows(bucket, doubles))
        if self._waiting and self._waiting[0].rank != waiting.rank:
            self._move_waiting(step, lr)
        self._waiting.append(waiting)
        # numbered bases are made for each stack, and would be made again
        waits = self.in_stacks and waiting.takes_no_memory and not self.bases.numbered
        most = ROOT_BYTES if waits else 0
        if sum(each.bytes for each in self._waiting) >= most:
            self._move_waiting(step, lr)

    def end(self, step: int, lr: float) -> None:
        self._move_waiting(step, lr)

    def _move_waiting(self, step: int, lr: float) -> None:
        """Update the weights of the matrices that wait, whose roots are found together."""
        waiting, self._waiting = self._waiting, []
        roots = inverse_roots([gram for each in waiting for gram in each.grams]) if waiting else []
        for each in waiting:
            own, roots = roots[: len(each.bucket)], roots[len(each.bucket) :]
            for stack in self.stacks_in(each.bucket, each.wide, own):
                exp_avg, root = stack.tensors
                size = -UPDATE_RMS * max(stack.first.shard.shape) ** 0.5
                update = products(exp_avg.double(), root).mul_(size).to(exp_avg.dtype)
                self.apply_lifted_to(stack, update, lr, step)
            self.keeper.write(each.moments, each.wide, step)
