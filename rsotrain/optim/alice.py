"""Alice: Adam in a tracked, switched subspace, and a scaled residual (ICLR 2026, arXiv 2502.07752)."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import AliceConfig
from rsotrain.optim.base import Settings
from rsotrain.optim.functional import limited_growth_
from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix, grams_of_rows
from rsotrain.optim.residuals import rounding_noise
from rsotrain.optim.solvers import PLAIN_ADAM, Solver
from rsotrain.optim.stacks import add_lifted_, product_in, put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.subspace_optimizer import Stack
from rsotrain.optim.with_bases import Subspace
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import resolve_rank
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
        return PLAIN_ADAM

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
        for stack in self.stacks_in(bucket, gradients, projected, updates):
            (a, r, update), basis, m = stack.tensors, stack.basis, stack.first
            if m.rank == m.size:
                self.apply_lifted_to(stack, update, lr, step)
                continue
            residual = self.residual_of(stack, a, r)
            outside = residual.mul_(self._scales(stack, residual, r, step))
            add_lifted_(outside, update, basis, 1.0, decay_factor=-self.config.compensation)
            self.apply_to(stack, outside, lr, step)

    def _track(self, bucket: list[Matrix], projected: list[Tensor]) -> None:
        if not self.config.tracking:
            return
        tracked = [self.state[m.name]["tracked"] for m in bucket]
        grams = [gram.to(tracked[0].dtype) for gram in grams_of_rows(bucket, projected)]
        torch._foreach_lerp_(tracked, grams, 1.0 - self.config.tracking)

    def _scales(self, stack: Stack, residual: Tensor, projected: Tensor, step: int) -> Tensor:
        """√(k−r)·diag(p)^-½ with the limiter's factor, (n, M, 1) as the residual, after the update of p."""
        first = stack.first
        kept = [self.moments[m.name]["residual_sq"] for m in stack.matrices]
        wide = self.keeper.read(kept)
        averages = stacked(wide)
        norms = first.row_norms(residual, averages.dtype)
        noise = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
        is_there = norms > noise.mul_(rounding_noise(first.size, residual.dtype))
        squares = norms.square_().mul_(is_there)
        averages.lerp_(squares, 1.0 - self.settings.betas[0])
        # diag(p)^-1, and 0 for rows that have no residual
        inverse = (is_there / averages).nan_to_num_(nan=0.0).mul_(first.size - first.rank)
        put_back_(wide, averages)
        self.keeper.write(kept, wide, step)
        total = torch.bmm(squares.mT, inverse)  # ‖C‖²
        norm = (total if first.by_columns else first.shard.sum_(total)).sqrt_().flatten()
        limits = [self.state[m.name]["residual_norm"] for m in stack.matrices]
        previous = stacked(limits)
        factors = limited_growth_(norm, previous, self.config.max_growth)
        put_back_(limits, previous)
        return product_in(residual.dtype, inverse.sqrt_(), factors.view(-1, 1, 1))
