"""Methods that run GaLore's Adam in the subspace and do something with the gradient outside it."""

from typing import ClassVar

import torch
from torch import Tensor

from rsotrain.optim.base import work_dtype
from rsotrain.optim.functional import channel_scales, limited_growth_, row_norms
from rsotrain.optim.galore import GaLore
from rsotrain.optim.subspace_part import Matrix
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import add_lifted_


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


class Fira(GaLore):
    """GaLore plus the residual, each row scaled as Adam scales it inside (Fira, arXiv 2410.01623).

    W ← (1 − ηλ)W − η (lift(N) + limit(φ ⊙ (A − lift(R)))), φ_j = ‖N_j‖/‖R_j‖. The authors' code takes
    A − α·lift(R) for the residual; this is the paper's. At full rank the residual is left out.
    """

    own_settings: ClassVar = ("max_growth",)
    needs_orthonormal: ClassVar = True
    max_growth: float

    def initial_state(self, matrix: Matrix) -> dict[str, Tensor]:
        norm = torch.zeros((), device=matrix.parameter.device)
        return super().initial_state(matrix) | {"residual_norm": norm}

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        descents = self.descend(bucket, projected, step)
        for m, a, r, descent in zip(bucket, gradients, projected, descents, strict=True):
            if m.rank == m.size:
                add_lifted_(m.weight, descent, self.basis(m), lr, self.kept_share(lr))
                continue
            basis = self.basis(m)
            residual = a.to(basis.dtype, copy=True)
            add_lifted_(residual, r, basis, -1.0)
            scales = channel_scales(descent, r)
            # ‖φ ⊙ lift(R)‖ = ‖N‖: what rounding leaves of it where the residual is zero
            norm, inside = self._norms(m, scaled_row_norms(residual, scales), descent)
            noise = rounding_noise(m.size, basis.dtype) * inside
            previous = self.state[m.name]["residual_norm"]
            limited = scales * -limited_growth_(norm, previous, self.max_growth, noise)
            update = residual.mul_(limited.to(basis.dtype))  # of one dtype: mixed takes four times as long
            add_lifted_(update, descent, basis, 1.0)
            self.apply_(m.weight, update, lr)

    @staticmethod
    def _norms(matrix: Matrix, residual: Tensor, descent: Tensor) -> list[Tensor]:
        if matrix.by_columns:
            return [*matrix.norms(residual), *matrix.low_rank_norms(descent)]
        return matrix.norms(residual, descent)  # one all-reduce for both


class Frugal(GaLore):
    """Adam in the subspace, signSGD outside it (FRUGAL, arXiv 2411.07837).

    W ← (1 − ηλ)W − η (lift(N) + f·sign(A − lift(R))), f = ``free_scale``. Rounding errors have a sign
    too: a residual that is no larger than they are counts as 0. (Of the products: a basis that is itself
    inexact, as randomized_svd's, leaves residuals that count.) At full rank there is no outside.
    """

    own_settings: ClassVar = ("free_scale",)
    needs_orthonormal: ClassVar = True
    free_scale: float

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        descents = self.descend(bucket, projected, step)
        for m, a, r, descent in zip(bucket, gradients, projected, descents, strict=True):
            if m.rank == m.size:
                add_lifted_(m.weight, descent, self.basis(m), lr, self.kept_share(lr))
                continue
            basis = self.basis(m)
            residual = a.to(basis.dtype, copy=True)
            add_lifted_(residual, r, basis, -1.0)
            signs = self._signs_(residual, m, a, r, basis)
            add_lifted_(signs, descent, basis, 1.0, kept_share=-self.free_scale)
            self.apply_(m.weight, signs, lr)

    def _signs_(
        self, residual: Tensor, matrix: Matrix, gradient: Tensor, projected: Tensor, basis: Tensor
    ) -> Tensor:
        """Those of the entries of ``residual`` that exceed rounding, 0 of the others; overwrites it."""
        if self.subspace.sampler.axes:
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

    own_settings: ClassVar = ("per_tensor", "max_growth")
    per_tensor: bool
    max_growth: float

    def initial_state(self, matrix: Matrix) -> dict[str, Tensor]:
        norm = torch.zeros((), device=matrix.parameter.device)
        return super().initial_state(matrix) | {"update_norm": norm}

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        if self.subspace.sampler.unit_columns:
            torch._foreach_mul_(projected, [(m.size / m.rank) ** 0.5 for m in bucket])
        descents = self.descend(bucket, projected, step)
        for m, a, r, descent in zip(bucket, gradients, projected, descents, strict=True):
            if self.per_tensor:
                adapted, plain = m.low_rank_norms(descent, r)
                # 1×1: times a number without dimensions, a bfloat16 gradient stays bfloat16
                scales = (adapted / plain).where(plain > 0, 0.0).view(1, 1)
            else:
                scales = channel_scales(descent, r)
            (norm,) = m.norms(scaled_row_norms(a, scales))
            factor = limited_growth_(norm, self.state[m.name]["update_norm"], self.max_growth)
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

    own_settings: ClassVar = ("rho",)
    needs_orthonormal: ClassVar = True
    rho: float

    def initial_state(self, matrix: Matrix) -> dict[str, Tensor]:
        error = torch.zeros_like(matrix.weight, dtype=work_dtype(matrix.parameter.dtype))
        return super().initial_state(matrix) | {"error": error}

    def state_dim(self, name: str, key: str) -> int | None:
        if key == "error":  # M×k
            return 1 if self.by_name[name].by_columns else 0
        return super().state_dim(name, key)

    def gradient(self, matrix: Matrix) -> Tensor:
        return self.state[matrix.name]["error"].add_(super().gradient(matrix))

    def sampled_gradient(self, matrix: Matrix, gradient: Tensor, step: int) -> Tensor:
        if step == 1:
            return gradient
        state = self.state[matrix.name]
        correction = 1.0 - self.settings.betas[0] ** (step - 1)
        mixed = gradient * (1.0 - self.rho)
        momentum = state["exp_avg"].to(mixed.dtype) / correction
        add_lifted_(mixed, momentum, self.basis(matrix), self.rho)
        return mixed

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        state = self.state[matrix.name]
        error = state["error"]
        old = state["exp_avg"].to(error.dtype)
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
