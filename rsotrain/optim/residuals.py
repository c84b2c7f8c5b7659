"""Methods that run GaLore's solver in the subspace and also use the gradient outside it."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsotrain.config.choices import InnerSolver, OnRefresh
from rsotrain.errors import require
from rsotrain.optim.functional import channel_scales, limited_growth_, row_norms
from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.solvers import Solver, solver_of
from rsotrain.optim.stacks import add_lifted_, product_in, put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.with_bases import pair
from rsotrain.subspace import projection
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.samplers import Columns, Sampler


def rounding_noise(size: int, dtype: torch.dtype) -> float:
    """Relative size of A − AQQᵀ from rounding errors alone; ``size``: k; ``dtype``: of Q.

    It is four times the rounding error of sums of k terms in float32, plus that of the entries of Q where
    these have fewer bits.
    """
    noise = 4 * size**0.5 * torch.finfo(torch.float32).eps
    return noise if dtype.itemsize >= 4 else noise + 2 * torch.finfo(dtype).eps


def scaled_row_norms(piece: Tensor, scales: Tensor) -> Tensor:
    """Norms of the rows of scales ⊙ ``piece`` without forming the product; their norm is the product's norm.

    ``piece``: (n, M, k); ``scales``: (n, M, 1), or (n, 1, 1) for one common scale. Returns (n, M, 1).
    """
    return row_norms(piece, scales.dtype).mul_(scales)


def _with_norm(state: StateSize) -> StateSize:
    return replace(state, wide=state.wide + 1)


class Fira(GaLore):
    """GaLore plus the residual, whose rows are scaled as Adam scales those of R (Fira, arXiv 2410.01623).

    W ← (1 − ηλ)W − η (lift(N) + limit(φ ⊙ (A − lift(R)))), φ_j = ‖N_j‖/‖R_j‖. The residual is the paper's;
    the authors' code takes A − α·lift(R). With ``residual_at_lr`` its rate is η/α, as theirs. At full rank
    there is no residual.
    """

    replicated_state: ClassVar = GaLore.replicated_state | {"residual_norm"}
    needs_orthonormal: ClassVar = True

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        super().refuse(config, sampler)
        require(
            config.scale > 0 or not config.residual_at_lr,
            "optimizer.residual_at_lr is for optimizer.scale > 0; set it to false, or scale",
        )

    def add_state(self, matrix: Matrix) -> None:
        super().add_state(matrix)
        self.add_tensor(matrix.name, "residual_norm", torch.zeros((), device=matrix.parameter.device))

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return _with_norm(super().matrix_state(config, matrix))

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        updates = self.negative_updates(bucket, projected, step)
        for stack in self.stacks_in(bucket, gradients, projected, updates):
            (a, r, update), basis, m = stack.tensors, stack.basis, stack.first
            if m.rank == m.size:
                self.apply_lifted_to(stack, update, lr, step)
                continue
            residual = self.residual_of(stack, a, r)
            scales = channel_scales(update, r)
            # rounding errors of the scaled residual are relative to ‖φ ⊙ lift(R)‖ = ‖N‖
            norm, inside = self._norms(m, scaled_row_norms(residual, scales), update)
            noise = rounding_noise(m.size, basis.dtype) * inside
            kept = [self.state[own.name]["residual_norm"] for own in stack.matrices]
            previous = stacked(kept)
            factors = limited_growth_(norm, previous, self.config.max_growth, noise)
            put_back_(kept, previous)
            # in the dtype of the residual, as mixed dtypes take four times as long
            limited = product_in(residual.dtype, scales, factors.view(-1, 1, 1))
            share = 1.0 / self.config.scale if self.config.residual_at_lr else 1.0
            outside = residual.mul_(limited)
            add_lifted_(outside, update, basis, 1.0, decay_factor=-share)
            self.apply_to(stack, outside, lr, step)

    @staticmethod
    def _norms(matrix: Matrix, residual: Tensor, update: Tensor) -> list[Tensor]:
        if matrix.by_columns:
            return [*matrix.norms(residual), *matrix.low_rank_norms(update)]
        return matrix.norms(residual, update)  # one all-reduce for both


class Frugal(GaLore):
    """Adam in the subspace, signSGD outside it (FRUGAL, arXiv 2411.07837).

    W ← (1 − ηλ)W − η (lift(N) + f·sign(A − lift(R))), f = ``free_scale``. Entries of the residual that are no
    larger than the rounding errors of the products count as 0, since these errors have a sign, too. (A basis
    that only approximates the dominant subspace, as that of randomized_svd, or of svd on a GPU, leaves a true
    residual.) At full rank there is no residual.
    """

    needs_orthonormal: ClassVar = True

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        updates = self.negative_updates(bucket, projected, step)
        for stack in self.stacks_in(bucket, gradients, projected, updates):
            (a, r, update), basis, m = stack.tensors, stack.basis, stack.first
            if m.rank == m.size:
                self.apply_lifted_to(stack, update, lr, step)
                continue
            noise = None
            if basis.dtype.itemsize >= 4 and self.subspace.sampler.columns is not Columns.axes:
                noise = m.row_norms(a, basis.dtype).mul_(rounding_noise(m.size, basis.dtype))
            signs = self._signs_(self.residual_of(stack, a, r), noise, r, basis)
            add_lifted_(signs, update, basis, 1.0, decay_factor=-self.config.free_scale)
            self.apply_to(stack, signs, lr, step)

    def _signs_(self, residual: Tensor, noise: Tensor | None, projected: Tensor, basis: Tensor) -> Tensor:
        """Signs of the entries of ``residual`` that exceed rounding errors, else 0. Overwrites it.

        ``noise``: rounding errors of the rows; None: those of products in bfloat16.
        """
        if self.subspace.sampler.columns is Columns.axes:
            return residual.sign_()
        info = torch.finfo(basis.dtype)
        if noise is not None:
            residual.div_(noise.clamp_(min=info.tiny))
        else:
            # The rounding errors of A, Q and R are independent and proportional to the entries of lift(R),
            # about ‖R_i‖‖Q_j‖/√r. Their sum is about 0.4 eps of these; the bound is five times as large.
            rows = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
            columns = torch.linalg.vector_norm(basis, dim=-1, dtype=rows.dtype).unsqueeze(-2)
            for errors in (rows.mul_(2 * info.eps / basis.shape[-1] ** 0.5), columns):
                residual.div_(errors.to(basis.dtype).clamp_(min=info.tiny))
        return residual.trunc_().clamp_(-1.0, 1.0)


class Apollo(GaLore):
    """The full gradient, scaled as Adam scales its random projection (APOLLO, arXiv 2412.05270).

    W ← (1 − ηλ)W − η·limit(s ⊙ A) with s_j = ‖N_j‖/‖R_j‖ for each row, or s = ‖N‖_F/‖R‖_F for the whole
    matrix (``per_tensor``, APOLLO-Mini). The paper's random P has E[PPᵀ] = I; projections on bases of unit
    columns are multiplied by √(k/r) to match, so that one learning rate fits all samplers. The paper's factor
    √scale is a part of the learning rate here.
    """

    replicated_state: ClassVar = GaLore.replicated_state | {"update_norm"}

    def add_state(self, matrix: Matrix) -> None:
        super().add_state(matrix)
        self.add_tensor(matrix.name, "update_norm", torch.zeros((), device=matrix.parameter.device))

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return _with_norm(super().matrix_state(config, matrix))

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        if self.subspace.sampler.columns is not Columns.scaled:
            torch._foreach_mul_(projected, [(m.size / m.rank) ** 0.5 for m in bucket])
        updates = self.negative_updates(bucket, projected, step)
        for stack in self.stacks_in(bucket, gradients, projected, updates):
            (a, r, update), m = stack.tensors, stack.first
            if self.config.per_tensor:
                adapted, plain = m.low_rank_norms(update, r)
                scales = (adapted / plain).masked_fill_(plain <= 0, 0.0).view(-1, 1, 1)
            else:
                scales = channel_scales(update, r)
            (norm,) = m.norms(scaled_row_norms(a, scales))
            kept = [self.state[own.name]["update_norm"] for own in stack.matrices]
            previous = stacked(kept)
            factors = limited_growth_(norm, previous, self.config.max_growth)
            put_back_(kept, previous)
            self.apply_to(stack, a * (scales * factors.view(-1, 1, 1)), lr, step, scale=-1.0)


class LDAdam(GaLore):
    """Low-dimensional Adam with error feedback (LDAdam, arXiv 2410.16103, algorithm 1).

    Each step adds the error E of earlier steps to the gradient, A = G + E, samples the basis from
    ρ·lift_old(M̂) + (1−ρ)A, transports the moments and takes GaLore's step. Then
    E ← A − lift(AQ) + β₁/(1−β₁) (lift_old(M_old) − lift(M_transported)).
    E is M×k in at least float32. The authors keep it in the gradient's memory; here it is optimizer state. It
    also collects the rounding errors of bfloat16 products. The captured energy that is logged is that of A.
    The method is meant for ``update_proj_gap`` = 1; with a larger one, E holds what lies outside the subspace
    until the next refresh.
    """

    needs_orthonormal: ClassVar = True

    @classmethod
    def solver_for(cls, config: Any) -> Solver:
        return solver_of(InnerSolver.adam)  # error feedback and transport are defined for Adam

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        super().refuse(config, sampler)
        assert sampler is not None
        require(
            config.on_refresh is OnRefresh.transport,
            f"optimizer={config.name} is defined by transported moments; set optimizer.on_refresh=transport",
        )
        require(
            not sampler.post_update,
            f"{pair(config, sampler)}: error feedback needs the new basis before the update, and this"
            " sampler's comes after; use another sampler, such as randomized_svd",
        )

    def add_state(self, matrix: Matrix) -> None:
        super().add_state(matrix)
        error = torch.zeros_like(matrix.weight, dtype=work_dtype(matrix.parameter.dtype))  # M×k
        self.add_tensor(matrix.name, "error", error, 1 if matrix.by_columns else 0)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        state = super().matrix_state(config, matrix)
        return replace(state, wide=state.wide + math.prod(matrix.piece))

    def _exp_avg(self, matrix: Matrix) -> Tensor:
        return self.keeper.read([self.moments[matrix.name]["exp_avg"]])[0]

    def gradient(self, matrix: Matrix) -> Tensor:
        return self.state[matrix.name]["error"].add_(super().gradient(matrix))

    def sampled_gradient(self, matrix: Matrix, gradient: Tensor, step: int) -> Tensor:
        if step == 1:
            return gradient
        rho = self.config.rho
        correction = 1.0 - self.settings.betas[0] ** (step - 1)
        mixed = gradient * (1.0 - rho)
        momentum = self._exp_avg(matrix).to(mixed.dtype) / correction
        projection.add_lifted_(mixed, momentum, self.basis(matrix), rho)
        return mixed

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        error = self.state[matrix.name]["error"]
        old = self._exp_avg(matrix).to(error.dtype)
        beta1 = self.settings.betas[0]
        # the difference is orthogonal to the new basis, so it may be added before A is projected
        projection.add_lifted_(error, old, matrix.columns_of(change.old), beta1 / (1.0 - beta1))
        moved = old @ change.transition.T
        projection.add_lifted_(error, moved, self.basis(matrix), -beta1 / (1.0 - beta1))
        super().basis_changed(matrix, change, step)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        for stack in self.stacks_in(bucket, gradients, projected):
            a, r = stack.tensors
            add_lifted_(a, r, stack.basis, -1.0)  # ``a`` is the state tensor "error" on a CPU
            put_back_([self.state[m.name]["error"] for m in stack.matrices], a)
        super().apply(bucket, gradients, projected, step, lr)
