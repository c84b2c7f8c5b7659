"""Subset-norm and subspace-momentum (Nguyen & Nguyen, ICML 2025, arXiv 2411.07120)."""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.choices import BiasCorrection
from rsotrain.config.methods import OptimizerConfig
from rsotrain.errors import UserError
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import chosen
from rsotrain.optim.functional import Betas, scaled_subsets, subset_norm_factors_
from rsotrain.optim.matrix import Matrix, matrix_of
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.stacks import add_lifted_, put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.subspace_optimizer import SubspaceOptimizer
from rsotrain.parallel.sharding import local
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import oriented, resolve_rank

_KINDS = ("exp_avg", "subset_sq")


def resolve_subset_size(subset_size: int | None, size: int, name: str) -> int:
    """Entries in a subset of a row of ``size``; None: all. UserError if they do not divide ``size``."""
    if subset_size is None:
        return size
    if subset_size < 1 or size % subset_size:
        raise UserError(
            f"optimizer.subset_size={subset_size} does not divide the smaller dimension ({size}) of {name};"
            " give a divisor of it, or null for whole rows"
        )
    return subset_size


def _corrected(config: Any, betas: Betas) -> bool:
    """Is there a bias correction? In the authors' code Adam's form alone has one."""
    return config.bias_correction is BiasCorrection.all_forms or (betas[0] > 0 and betas[1] < 1)


def _subsets(config: Any, matrix: MatrixSize) -> tuple[int, int]:
    """(number of rows, number of subsets in a row)."""
    return matrix.rows, matrix.size // (config.subset_size or matrix.size)


class SubsetNorm(ParamGroupOptimizer):
    """SN: momentum of full size, one second moment for each subset of a row of the oriented gradient.

    M ← β₁M + (1−β₁)A;  V ← β₂V + (1−β₂)s;  W ← (1 − ηλ)W − η·√(1−β₂ᵗ)/(1−β₁ᵗ)·M/(√V + ε). s is a sum, not a
    mean, over the subset, so updates are √subset_size times smaller than Adam's. β₁ = 0 gives RMSProp-SN,
    β₂ = 1 AdaGrad-SN.
    """

    takes_adagrad_beta: ClassVar = True

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        self.matrices = [matrix_of(name, p) for name, p in parameters.items()]
        self.by_name = {m.name: m for m in self.matrices}
        chosen_size = self.config.subset_size
        self.sizes = {m.name: resolve_subset_size(chosen_size, m.size, m.name) for m in self.matrices}
        for m in self.matrices:
            self.add_moment(m.name, "exp_avg", local(m.parameter).shape, m.shard.dim)
            subsets = (m.num_rows, m.size // self.sizes[m.name])
            self.add_moment(m.name, "subset_sq", subsets, m.rows_dim)

    def is_replicated(self, name: str, key: str) -> bool:
        return key.startswith("subset_sq") and matrix_of(name, self.parameters[name]).by_columns

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return StateSize((matrix.piece, _subsets(config, matrix)))

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        betas, eps = self.settings.betas, self.settings.eps
        for stack in chosen(self.stacks, names):
            own = [self.by_name[name] for name in stack]
            m = own[0]
            size = self.sizes[m.name]
            gradient = stacked([gradient_of(each.name, each.parameter) for each in own])
            gradient = gradient.to(work_dtype(gradient.dtype))
            moments = [self.moments[each.name][kind] for kind in _KINDS for each in own]
            wide = self.keeper.read(moments)
            exp_avg, subset_sq = stacked(wide[: len(own)]), stacked(wide[len(own) :])
            exp_avg.lerp_(gradient, 1.0 - betas[0])
            sums = m.subset_sums(oriented(gradient, m.side), size)
            factors = subset_norm_factors_(
                subset_sq, sums, step, betas, eps, corrected=_corrected(self.config, betas)
            )
            momentum = oriented(exp_avg, m.side)
            update = scaled_subsets(momentum, factors, m.subsets_of_columns(size))
            self.apply_stack_(stack, update, lr, step, m.side)
            put_back_(wide[: len(own)], exp_avg)
            put_back_(wide[len(own) :], subset_sq)
            self.keeper.write(moments, wide, step)


class SubspaceMomentum(SubspaceOptimizer):
    """SM over SN: momentum in the subspace, the plain gradient outside it, and SN's second moment.

    M ← β₁M + (1−β₁)R, and lift(M) + (A − lift(R)) replaces SN's M in the update. With subset_size = 1 the
    second moment is Adam's (SM alone). By default a refresh sets M ← 0. The authors' code takes one more step
    with the old momentum at a refresh and loses the gradient of that step; this implementation does not.
    """

    needs_orthonormal: ClassVar = True
    takes_adagrad_beta: ClassVar = True

    def add_state(self, matrix: Matrix) -> None:
        subset_size = resolve_subset_size(self.config.subset_size, matrix.size, matrix.name)
        subsets = (matrix.num_rows, matrix.size // subset_size)
        self.add_moment(matrix.name, "exp_avg", (matrix.num_rows, matrix.rank), matrix.rows_dim)
        self.add_moment(matrix.name, "subset_sq", subsets, matrix.rows_dim)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        rank = resolve_rank(config.rank, matrix.size, matrix.name)
        moments = ((matrix.rows, rank), _subsets(config, matrix))
        return StateSize(moments, ((matrix.size, rank),))

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        self.momentum_changed(matrix, change, step)

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        betas, eps = self.settings.betas, self.settings.eps
        moments = [self.moments[m.name][kind] for kind in _KINDS for m in bucket]
        wide = self.keeper.read(moments)
        exp_avgs, subset_sqs = wide[: len(bucket)], wide[len(bucket) :]
        torch._foreach_lerp_(exp_avgs, projected, 1.0 - betas[0])
        if self.in_stacks:
            differences = list((stacked(exp_avgs) - stacked(projected)).unbind())
        else:
            differences = list(torch._foreach_sub(exp_avgs, projected))  # M − R
        for stack in self.stacks_in(bucket, gradients, differences, subset_sqs):
            (a, difference, subset_sq), basis, m = stack.tensors, stack.basis, stack.first
            size = m.size // subset_sq.shape[-1]
            sums = m.subset_sums(a.to(difference.dtype), size)
            factors = subset_norm_factors_(
                subset_sq, sums, step, betas, eps, corrected=_corrected(self.config, betas)
            )
            numerator = a.to(basis.dtype, copy=True)
            add_lifted_(numerator, difference, basis, 1.0)
            update = scaled_subsets(numerator, factors, m.subsets_of_columns(size))
            self.apply_to(stack, update, lr, step)
            if self.in_stacks:
                put_back_(subset_sqs, subset_sq)
        self.keeper.write(moments, wide, step)
