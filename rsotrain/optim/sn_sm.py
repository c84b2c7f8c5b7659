"""Subset-norm and subspace-momentum (Nguyen & Nguyen, ICML 2025, arXiv 2411.07120)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OnRefresh
from rsotrain.errors import UserError
from rsotrain.optim.base import Part, Settings, gradient_of, work_dtype
from rsotrain.optim.functional import scaled_subsets, subset_norm_factors_, transport_momentum_
from rsotrain.optim.subspace_part import Matrix, SubspacePart, matrix_of
from rsotrain.parallel.sharding import local
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import add_lifted_, oriented

_KINDS = ("exp_avg", "subset_sq")


def resolve_subset_size(subset_size: int | None, size: int, name: str) -> int:
    """Entries in a subset of a row of ``size``; None: all. UserError if it does not divide ``size``."""
    if subset_size is None:
        return size
    if subset_size < 1 or size % subset_size:
        raise UserError(
            f"optimizer.subset_size={subset_size} does not divide the smaller dimension ({size}) of {name};"
            " give a divisor of it, or null for whole rows"
        )
    return subset_size


class SubsetNorm(Part):
    """SN: momentum of full size, one second moment for each subset of a row of the oriented gradient.

    M ← β₁M + (1−β₁)A;  V ← β₂V + (1−β₂)s;  W ← (1 − ηλ)W − η·√(1−β₂ᵗ)/(1−β₁ᵗ)·M/(√V + ε). A sum, not a
    mean, over the subset: steps are √subset_size smaller than Adam's. β₁ = 0 is RMSProp-SN, β₂ = 1
    AdaGrad-SN.
    """

    own_settings: ClassVar = ("subset_size",)
    subset_size: int | None

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        **own: Any,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, **own)
        self.matrices = [matrix_of(name, p) for name, p in parameters.items()]
        self.sizes = {m.name: resolve_subset_size(self.subset_size, m.size, m.name) for m in self.matrices}
        for m in self.matrices:
            subsets = (m.num_rows, m.size // self.sizes[m.name])
            self.state[m.name] = {
                "exp_avg": self.keeper.zeros(local(m.parameter).shape, m.parameter),
                "subset_sq": self.keeper.zeros(subsets, m.parameter),
            }

    def state_dim(self, name: str, key: str) -> int | None:
        shard = self.shards[name]
        if key == "exp_avg" or shard.dim is None:
            return shard.dim
        return None if matrix_of(name, self.parameters[name]).by_columns else 0

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        betas, eps = self.settings.betas, self.settings.eps
        for m in self.matrices:
            size = self.sizes[m.name]
            gradient = gradient_of(m.name, m.parameter).to(work_dtype(m.parameter.dtype))
            state = [self.state[m.name][kind] for kind in _KINDS]
            exp_avg, subset_sq = self.keeper.read(state)
            exp_avg.lerp_(gradient, 1.0 - betas[0])
            sums = m.subset_sums(oriented(gradient, m.side), size)
            factors = subset_norm_factors_(subset_sq, sums, step, betas, eps)
            momentum = oriented(exp_avg, m.side)
            self.apply_(m.weight, scaled_subsets(momentum, factors, m.subsets_of_columns(size)), lr)
            labels = [f"{m.name}{m.shard.label}.exp_avg", f"{m.label}.subset_sq"]
            self.keeper.write(state, [exp_avg, subset_sq], labels, step)


class SubspaceMomentum(SubspacePart):
    """SM over SN: momentum in the subspace, the plain gradient outside, SN's second moment.

    M ← β₁M + (1−β₁)R;  numerator = lift(M) + (A − lift(R));  the rest as SN, with whose subset_size = 1
    this is Adam's second moment (SM alone). By default M ← 0 when the basis changes; the authors' code
    takes one more step with the old momentum there and loses that step's gradient, which this does not.
    """

    own_settings: ClassVar = ("subset_size",)
    needs_orthonormal: ClassVar = True
    subset_size: int | None

    def initial_state(self, matrix: Matrix) -> dict[str, Tensor]:
        subset_size = resolve_subset_size(self.subset_size, matrix.size, matrix.name)
        subsets = (matrix.num_rows, matrix.size // subset_size)
        return {
            "exp_avg": self.keeper.zeros((matrix.num_rows, matrix.rank), matrix.parameter),
            "subset_sq": self.keeper.zeros(subsets, matrix.parameter),
        }

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        exp_avg = self.state[matrix.name]["exp_avg"]
        if self.subspace.on_refresh is OnRefresh.reset:
            exp_avg.zero_()
        elif self.subspace.on_refresh is OnRefresh.transport:
            wide = self.keeper.read([exp_avg])
            transport_momentum_(wide[0], change.transition)
            self.keeper.write([exp_avg], wide, [f"{matrix.label}.exp_avg.transport"], step)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        betas, eps = self.settings.betas, self.settings.eps
        state = [self.state[m.name][kind] for kind in _KINDS for m in bucket]
        wide = self.keeper.read(state)
        exp_avgs, subset_sqs = wide[: len(bucket)], wide[len(bucket) :]
        torch._foreach_lerp_(exp_avgs, projected, 1.0 - betas[0])
        differences = torch._foreach_sub(exp_avgs, projected)  # M − R
        for m, a, difference, subset_sq in zip(bucket, gradients, differences, subset_sqs, strict=True):
            size, basis = m.size // subset_sq.shape[1], self.basis(m)
            sums = m.subset_sums(a.to(difference.dtype), size)
            factors = subset_norm_factors_(subset_sq, sums, step, betas, eps)
            numerator = a.to(basis.dtype, copy=True)
            add_lifted_(numerator, difference, basis, 1.0)
            self.apply_(m.weight, scaled_subsets(numerator, factors, m.subsets_of_columns(size)), lr)
        self.keeper.write(state, wide, [f"{m.label}.{kind}" for kind in _KINDS for m in bucket], step)
