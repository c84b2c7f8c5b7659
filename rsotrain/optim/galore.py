"""GaLore: a solver in the subspace, Adam as published or another one."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from rsotrain.optim.matrix import Matrix
from rsotrain.optim.solvers import Solver, solver_of
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.subspace_optimizer import SubspaceOptimizer
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import resolve_rank


class GaLore(SubspaceOptimizer):
    """A solver on R = A Q that drops the rest of the gradient (GaLore, arXiv 2403.03507, algorithm 2).

    W ← (1 − ηλ)W − η·lift(N), where for Adam N = M̂/(√V̂ + ε). ε is outside the bias correction, as in the
    paper's text; the authors' code has it inside. I3S and OSD are GaLore with other samplers. A refresh keeps
    the moments as they are (as in the paper), zeros them and their step count, or transports them to the new
    basis.
    """

    replicated_state: ClassVar = frozenset({"step"})

    @classmethod
    def solver_for(cls, config: Any) -> Solver:
        return solver_of(config.solver)

    @property
    def solver(self) -> Solver:
        return self.solver_for(self.config)

    def add_state(self, matrix: Matrix) -> None:
        for key in self.solver.moments:
            self.add_moment(matrix.name, key, (matrix.num_rows, matrix.rank), matrix.rows_dim)
        # the number of gradients in the moments
        self.add_tensor(matrix.name, "step", torch.zeros((), device=matrix.parameter.device))

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        rank = resolve_rank(config.rank, matrix.size, matrix.name)
        moments = len(cls.solver_for(config).moments)
        return StateSize(((matrix.rows, rank),) * moments, ((matrix.size, rank),), wide=1)

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        self.solver.basis_changed(
            self.subspace.on_refresh,
            self.moments[matrix.name],
            self.state[matrix.name]["step"],
            lambda: change.transition,
            self.settings,
            step,
        )

    def begin(self, matrices: list[Matrix]) -> None:
        torch._foreach_add_([self.state[m.name]["step"] for m in matrices], 1.0)

    def negative_updates(self, bucket: list[Matrix], projected: list[Tensor], step: int) -> list[Tensor]:
        """Update the moments by R; return −N, M×r each."""
        kept = [self.moments[m.name] for m in bucket]
        counts = [self.state[m.name]["step"] for m in bucket]
        return self.solver.negative_updates(projected, kept, counts, self.settings, step)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        updates = self.negative_updates(bucket, projected, step)
        for stack in self.stacks_in(bucket, updates):
            (update,) = stack.tensors
            self.apply_lifted_to(stack, update, lr, step)
