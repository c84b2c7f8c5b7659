"""Alice: Adam in a tracked, switched subspace, and a scaled residual (ICLR 2026, arXiv 2502.07752)."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.choices import InnerSolver, OnRefresh
from rsotrain.config.methods import AliceConfig
from rsotrain.optim.base import Settings
from rsotrain.optim.functional import inverse_root, limited_growth_
from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix, grams_of_rows
from rsotrain.optim.residuals import rounding_noise
from rsotrain.optim.solvers import Solver, solver_of
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.with_bases import Subspace
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import add_lifted_, resolve_rank
from rsotrain.subspace.sources import GradientSource, Source, TrackedSource


class Alice(GaLore):
    """W ← (1 − ηλ)W − η(lift(M/(√V + ε)) + α_c·limit(C)), with Adam's moments of R without bias correction.

    C = √(k−r)·diag(p)^-½ (A − lift(R)) with p ← β₁p + (1−β₁)‖A_j − lift(R)_j‖² for each row j of A, which is
    a column of the paper's G. S ← β₃S + (1−β₃)RᵀR, r×r, remembers the gradients: the sampler sees the Gram
    matrix β₃ U S Uᵀ + (1−β₃)AᵀA. A refresh keeps M, V and S as they are, zeros them or transports them. At
    full rank there is no residual, and rows of a residual that is only rounding errors count as 0.
    """

    replicated_state: ClassVar = GaLore.replicated_state | {"residual_norm", "tracked"}
    needs_orthonormal: ClassVar = True

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: AliceConfig,
        subspace: Subspace,
    ) -> None:
        settings = replace(settings, betas=config.subspace_betas)
        super().__init__(label, parameters, peak_lr, settings, config, subspace)

    @classmethod
    def solver_for(cls, config: Any) -> Solver:
        return solver_of(InnerSolver.adam)

    def add_state(self, matrix: Matrix) -> None:
        super().add_state(matrix)
        self.add_moment(matrix.name, "residual_sq", (matrix.num_rows, 1), matrix.rows_dim)
        device = matrix.parameter.device
        self.add_tensor(matrix.name, "residual_norm", torch.zeros((), device=device))
        if self.config.tracking:
            tracked = torch.zeros(matrix.rank, matrix.rank, device=device)
            self.add_tensor(matrix.name, "tracked", tracked)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        state = super().matrix_state(config, matrix)
        rank = resolve_rank(config.rank, matrix.size, matrix.name)
        wide = state.wide + 1 + (rank**2 if config.tracking else 0)
        return replace(state, moments=(*state.moments, (matrix.rows, 1)), wide=wide)

    def source(self, matrix: Matrix, gradient: Tensor, step: int) -> Source:
        source = super().source(matrix, gradient, step)
        if not self.config.tracking:
            return source
        assert isinstance(source, GradientSource)
        weight = self.config.tracking / (1.0 - self.config.tracking)
        return TrackedSource(source, self.bases[matrix.name], self.state[matrix.name]["tracked"], weight)

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        super().basis_changed(matrix, change, step)
        tracked = self.state[matrix.name].get("tracked")
        if tracked is not None and self.subspace.on_refresh is OnRefresh.reset:
            tracked.zero_()
        elif tracked is not None and self.subspace.on_refresh is OnRefresh.transport:
            transition = change.transition.to(tracked.dtype)
            tracked.copy_(transition @ tracked @ transition.T)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        self._track(bucket, projected)
        updates = self.negative_updates(bucket, projected, step)
        beta1, beta2 = self.settings.betas
        for m, a, r, update in zip(bucket, gradients, projected, updates, strict=True):
            # the solver's N is M/(1−β₁ᵗ) / √(V/(1−β₂ᵗ))
            count = self.state[m.name]["step"].double()
            corrections = (1.0 - beta1**count) / (1.0 - beta2**count).sqrt()
            update.mul_(corrections.to(update.dtype))
            basis = self.basis(m)
            if m.rank == m.size:
                self.apply_lifted_(m.name, update, basis, lr, step, m.side)
                continue
            residual = a.to(basis.dtype, copy=True)
            add_lifted_(residual, r, basis, -1.0)
            scales = self._scales(m, residual, r, step)
            outside = residual.mul_((scales * -self.config.compensation).to(basis.dtype))
            add_lifted_(outside, update, basis, 1.0)
            self.apply_(m.name, outside, lr, step, m.side)

    def _track(self, bucket: list[Matrix], projected: list[Tensor]) -> None:
        if not self.config.tracking:
            return
        for m, gram in zip(bucket, grams_of_rows(bucket, projected), strict=True):
            tracked = self.state[m.name]["tracked"]
            tracked.lerp_(gram.to(tracked.dtype), 1.0 - self.config.tracking)

    def _scales(self, matrix: Matrix, residual: Tensor, projected: Tensor, step: int) -> Tensor:
        """√(k−r)·diag(p)^-½ with the limiter's factor, M×1, after the update of p."""
        kept = [self.moments[matrix.name]["residual_sq"]]
        wide = self.keeper.read(kept)
        norms = matrix.row_norms(residual, wide[0].dtype)
        inside = torch.linalg.vector_norm(projected, dim=1, keepdim=True)
        norms = norms.where(norms > rounding_noise(matrix.size, residual.dtype) * inside, 0.0)
        wide[0].lerp_(norms.square(), 1.0 - self.settings.betas[0])
        scales = inverse_root(wide[0]).mul_((matrix.size - matrix.rank) ** 0.5).where(norms > 0, 0.0)
        self.keeper.write(kept, wide, step)
        (norm,) = matrix.low_rank_norms(norms * scales)
        previous = self.state[matrix.name]["residual_norm"]
        return scales * limited_growth_(norm, previous, self.config.max_growth)
