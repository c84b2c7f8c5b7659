"""Methods that run GaLore's Adam in the subspace and do something with the gradient outside it."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsotrain.config.methods import InnerSolver, OnRefresh
from rsotrain.errors import require
from rsotrain.optim.functional import channel_scales, limited_growth_, row_norms
from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.solvers import Solver, solver_of
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.with_bases import pair
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import add_lifted_
from rsotrain.subspace.samplers import Columns, Sampler


def rounding_noise(size: int, dtype: torch.dtype) -> float:
    """Relative size of what A − AQQᵀ is by rounding alone; ``size``: k, ``dtype``: that of Q.

    Four times the rounding of sums of k in float32, and of the entries of Q if they have less.
    """
    noise = 4 * size**0.5 * torch.finfo(torch.float32).eps
    return noise if dtype.itemsize >= 4 else noise + 2 * torch.finfo(dtype).eps


def scaled_row_norms(piece: Tensor, scales: Tensor) -> Tensor:
    """Norms of the rows of scales ⊙ ``piece``, without making it: its own norm is theirs.

    ``piece``: M×k; ``scales``: M×1, or one for all, 1×1. Returns M×1.
    """
    return row_norms(piece, scales.dtype).mul_(scales)


def _with_norm(state: StateSize) -> StateSize:
    return replace(state, wide=state.wide + 1)


class Fira(GaLore):
    """GaLore plus the residual, each row scaled as Adam scales it inside (Fira, arXiv 2410.01623).

    W ← (1 − ηλ)W − η (lift(N) + limit(φ ⊙ (A − lift(R)))), φ_j = ‖N_j‖/‖R_j‖. The authors' code takes
    A − α·lift(R) for the residual; this is the paper's. At full rank the residual is left out.
    """

    replicated_state: ClassVar = GaLore.replicated_state | {"residual_norm"}
    needs_orthonormal: ClassVar = True

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
        for m, a, r, update in zip(bucket, gradients, projected, updates, strict=True):
            if m.rank == m.size:
                add_lifted_(m.weight, update, self.basis(m), lr, self.decay_factor(lr))
                continue
            basis = self.basis(m)
            residual = a.to(basis.dtype, copy=True)
            add_lifted_(residual, r, basis, -1.0)
            scales = channel_scales(update, r)
            # ‖φ ⊙ lift(R)‖ = ‖N‖: what rounding leaves of it where the residual is zero
            norm, inside = self._norms(m, scaled_row_norms(residual, scales), update)
            noise = rounding_noise(m.size, basis.dtype) * inside
            previous = self.state[m.name]["residual_norm"]
            limited = scales * -limited_growth_(norm, previous, self.config.max_growth, noise)
            outside = residual.mul_(limited.to(basis.dtype))  # of one dtype: mixed takes four times as long
            add_lifted_(outside, update, basis, 1.0)
            self.apply_(m.weight, outside, lr)

    @staticmethod
    def _norms(matrix: Matrix, residual: Tensor, update: Tensor) -> list[Tensor]:
        if matrix.by_columns:
            return [*matrix.norms(residual), *matrix.low_rank_norms(update)]
        return matrix.norms(residual, update)  # one all-reduce for both


class Frugal(GaLore):
    """Adam in the subspace, signSGD outside it (FRUGAL, arXiv 2411.07837).

    W ← (1 − ηλ)W − η (lift(N) + f·sign(A − lift(R))), f = ``free_scale``. Rounding errors have a sign
    too: a residual that is no larger than they are counts as 0. (Of the products: a basis that is itself
    inexact, as randomized_svd's, leaves residuals that count.) At full rank there is no outside.
    """

    needs_orthonormal: ClassVar = True

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        updates = self.negative_updates(bucket, projected, step)
        for m, a, r, update in zip(bucket, gradients, projected, updates, strict=True):
            if m.rank == m.size:
                add_lifted_(m.weight, update, self.basis(m), lr, self.decay_factor(lr))
                continue
            basis = self.basis(m)
            residual = a.to(basis.dtype, copy=True)
            add_lifted_(residual, r, basis, -1.0)
            signs = self._signs_(residual, m, a, r, basis)
            add_lifted_(signs, update, basis, 1.0, decay_factor=-self.config.free_scale)
            self.apply_(m.weight, signs, lr)

    def _signs_(
        self, residual: Tensor, matrix: Matrix, gradient: Tensor, projected: Tensor, basis: Tensor
    ) -> Tensor:
        """Those of the entries of ``residual`` that exceed rounding, 0 of the others; overwrites it."""
        if self.subspace.sampler.columns is Columns.axes:
            return residual.sign_()
        info = torch.finfo(basis.dtype)
        if basis.dtype.itemsize >= 4:
            noise = matrix.row_norms(gradient, basis.dtype).mul_(rounding_noise(matrix.size, basis.dtype))
            residual.div_(noise.clamp_(min=info.tiny))
        else:
            # The roundings of A, Q and R are independent, and about as large as the entries of A that the
            # subspace makes: ‖R_i‖‖Q_j‖/√r. Together they leave 0.4 eps of these; 2 eps is five times that.
            rows = torch.linalg.vector_norm(projected, dim=1, keepdim=True)
            columns = torch.linalg.vector_norm(basis, dim=1, dtype=rows.dtype)
            for noise in (rows.mul_(2 * info.eps / matrix.rank**0.5), columns):
                residual.div_(noise.to(basis.dtype).clamp_(min=info.tiny))
        return residual.trunc_().clamp_(-1.0, 1.0)


class Apollo(GaLore):
    """The gradient itself, scaled as Adam scales its random projection (APOLLO, arXiv 2412.05270).

    W ← (1 − ηλ)W − η·limit(s ⊙ A), s_j = ‖N_j‖/‖R_j‖ for each row, or s = ‖N‖_F/‖R‖_F for the whole
    matrix (``per_tensor``, APOLLO-Mini). The paper's random P has E[PPᵀ] = I; bases of unit columns are
    scaled by √(k/r) to match, so that one learning rate serves every sampler. The paper's factor √scale
    belongs to the learning rate.
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
        for m, a, r, update in zip(bucket, gradients, projected, updates, strict=True):
            if self.config.per_tensor:
                adapted, plain = m.low_rank_norms(update, r)
                # 1×1: times a number without dimensions, a bfloat16 gradient stays bfloat16
                scales = (adapted / plain).where(plain > 0, 0.0).view(1, 1)
            else:
                scales = channel_scales(update, r)
            (norm,) = m.norms(scaled_row_norms(a, scales))
            factor = limited_growth_(norm, self.state[m.name]["update_norm"], self.config.max_growth)
            self.apply_(m.weight, a * (scales * -factor), lr)


class LDAdam(GaLore):
    """Low-dimensional Adam with error feedback (LDAdam, arXiv 2410.16103, algorithm 1).

    With the error E of the steps before: A = G + E; the basis is drawn from ρ·lift_old(M̂) + (1−ρ)A; the
    moments are transported; then GaLore's step, and
    E ← A − lift(AQ) + β₁/(1−β₁) (lift_old(M_old) − lift(M_transported)).
    E is M×k, in float32 at least: the authors keep it in the gradient's memory, here it counts as state.
    What bfloat16 products round away stays in it too. Captured energy is of A, not of G. Meant for
    ``update_proj_gap`` 1; with a larger one E carries what is outside the subspace from one basis to the
    next.
    """

    needs_orthonormal: ClassVar = True

    @classmethod
    def solver_for(cls, config: Any) -> Solver:
        return solver_of(InnerSolver.adam)  # error feedback and transport are Adam's

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
        add_lifted_(mixed, momentum, self.basis(matrix), rho)
        return mixed

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        error = self.state[matrix.name]["error"]
        old = self._exp_avg(matrix).to(error.dtype)
        beta1 = self.settings.betas[0]
        # orthogonal to the new basis, so it may be added before A is projected
        add_lifted_(error, old, matrix.columns_of(change.old), beta1 / (1.0 - beta1))
        moved = old @ change.transition.T
        add_lifted_(error, moved, self.basis(matrix), -beta1 / (1.0 - beta1))
        super().basis_changed(matrix, change, step)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        for m, a, r in zip(bucket, gradients, projected, strict=True):
            add_lifted_(a, r, self.basis(m), -1.0)  # a is the error's memory
        super().apply(bucket, gradients, projected, step, lr)
