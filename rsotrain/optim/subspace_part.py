"""The step that all low-rank methods share: refresh, project, hand over to the method."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OnRefresh
from rsotrain.optim.base import Part, Settings, buckets, gradient_of, work_dtype
from rsotrain.optim.functional import row_norms, subset_sums
from rsotrain.parallel.sharding import Shard, local, shard_of
from rsotrain.subspace.bases import Bases, BasisChange
from rsotrain.subspace.projection import Side, oriented, project_, resolve_rank, side_of
from rsotrain.subspace.samplers import Sampler, orthonormalised
from rsotrain.subspace.sources import GradientSource


@dataclass(frozen=True)
class Subspace:
    """How the bases of a part are chosen.

    ``rank``: as in ``resolve_rank``. ``gap``: optimizer steps between refreshes. ``seed``: the run's.
    ``compute_dtype``: of the projections and of the stored bases; None: at least float32. A basis that
    is itself optimised (a lagged sampler's) is stored in float32 whatever this says, but RSO's: it is
    multiplied by activations in ``compute_dtype``.
    """

    sampler: Sampler
    rank: int | float
    gap: int
    on_refresh: OnRefresh
    staggered: bool = False
    seed: int = 0
    total_steps: int = 1
    compute_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Matrix:
    """One low-rank parameter. Oriented, it is M×k, of which this rank has a piece, ``num_rows``×(columns).

    It is sharded in M where that can be, and then all is local but what sums over M. Where it is sharded
    in k, what sums over k is reduced, and what is M×r is the same on every rank.
    """

    name: str
    parameter: nn.Parameter
    side: Side
    rank: int
    shard: Shard

    @property
    def size(self) -> int:
        """k, of the whole."""
        return min(self.shard.shape)

    @property
    def by_columns(self) -> bool:
        """Is the projected dimension the sharded one?"""
        return self.shard.dim == (1 if self.side is Side.right else 0)

    @property
    def num_rows(self) -> int:
        if self.shard.dim is None or self.by_columns:
            return max(self.shard.shape)
        return self.shard.stop - self.shard.start

    @property
    def label(self) -> str:
        """Of what is M×r here."""
        return self.name if self.by_columns else f"{self.name}{self.shard.label}"

    @property
    def weight(self) -> Tensor:
        return oriented(local(self.parameter).detach(), self.side)

    def columns_of(self, basis: Tensor) -> Tensor:
        """The rows of a k×r basis for the columns that are here."""
        return basis[self.shard.start : self.shard.stop] if self.by_columns else basis

    def norms(self, *pieces: Tensor) -> list[Tensor]:
        """Frobenius norms of the wholes of these pieces, M×k or M×r, which are all of one kind."""
        return self.shard.norms(*pieces)

    def low_rank_norms(self, *pieces: Tensor) -> list[Tensor]:
        """The same for what is M×r."""
        return [torch.linalg.vector_norm(p) for p in pieces] if self.by_columns else self.shard.norms(*pieces)

    def row_norms(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """Norms of the rows of an M×k matrix, num_rows×1."""
        norms = row_norms(piece, dtype)
        return self.shard.sum_(norms.square_()).sqrt_() if self.by_columns else norms

    def subset_sums(self, piece: Tensor, subset_size: int) -> Tensor:
        """``subset_sums`` of the rows of an M×k matrix, num_rows×(k/subset_size)."""
        if not self.by_columns:
            return subset_sums(piece, subset_size)
        sums = piece.new_zeros(piece.shape[0], self.size // subset_size)
        subsets = self.subsets_of_columns(subset_size)
        assert subsets is not None
        return self.shard.sum_(sums.index_add_(1, subsets, piece.square()))

    def subsets_of_columns(self, subset_size: int) -> Tensor | None:
        """Where only some columns are here, the subset of each."""
        if not self.by_columns:
            return None
        columns = torch.arange(self.shard.start, self.shard.stop, device=self.parameter.device)
        return columns // subset_size


def matrix_of(name: str, parameter: nn.Parameter, rank: int = 1) -> Matrix:
    shard = shard_of(parameter)
    return Matrix(name, parameter, side_of(parameter.shape), rank, shard)


class SubspacePart(Part):
    """A method with one low-rank basis for each matrix.

    Matrices are updated in buckets: one matrix product each for the projections, then the elementwise
    work of the whole bucket in fused or foreach calls. ``needs_orthonormal``: the method makes no sense
    with other bases.
    """

    needs_orthonormal: ClassVar[bool] = False

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        subspace: Subspace,
        **own: Any,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, **own)
        self.subspace = subspace
        self.matrices = [
            matrix_of(name, p, resolve_rank(subspace.rank, min(p.shape), name))
            for name, p in parameters.items()
        ]
        self.by_name = {m.name: m for m in self.matrices}
        dtype = next(iter(parameters.values())).dtype
        self.product_dtype = subspace.compute_dtype or work_dtype(dtype)
        self.basis_dtype = work_dtype(dtype) if subspace.sampler.lagged else self.product_dtype
        self.bases = Bases(
            {m.name: (m.size, m.rank) for m in self.matrices},
            subspace.sampler,
            gap=subspace.gap,
            staggered=subspace.staggered,
            seed=subspace.seed,
            total_steps=subspace.total_steps,
            dtype=self.basis_dtype,
            devices={m.name: m.parameter.device for m in self.matrices},
            mesh=self.matrices[0].shard.mesh,
        )
        for m in self.matrices:
            self.state[m.name] = self.bases.state[m.name] | self.initial_state(m)
        # of the wholes: all ranks have the same buckets
        self.buckets = buckets(self.matrices, lambda m: max(m.shard.shape) * m.rank)

    # --- what a method defines -----------------------------------------------------------------

    @abstractmethod
    def initial_state(self, matrix: Matrix) -> dict[str, Tensor]:
        """The method's own state of one matrix, zeros."""

    @abstractmethod
    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        """Update the weights.

        ``gradients``: A, M×k each, not to be changed; ``projected``: R = A Q, M×r each, may be changed.
        """

    @abstractmethod
    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        """Fit the moments to the new basis, before the gradient of ``step`` enters them."""

    def basis(self, matrix: Matrix) -> Tensor:
        """The basis in use, as products take it; of it what belongs to the columns that are here."""
        return matrix.columns_of(self.bases[matrix.name].to(self.product_dtype))

    def state_dim(self, name: str, key: str) -> int | None:
        """All but what belongs to the basis, and scalars, has one row for each of M."""
        matrix = self.by_name[name]
        shared = key in self.bases.state[name] or self.state[name][key].ndim == 0
        return None if shared or matrix.by_columns else 0

    def gradient(self, matrix: Matrix) -> Tensor:
        """What is projected, oriented."""
        return oriented(gradient_of(matrix.name, matrix.parameter), matrix.side)

    def sampled_gradient(self, matrix: Matrix, gradient: Tensor, step: int) -> Tensor:
        """What the sampler looks at, given what ``gradient`` returned."""
        return gradient

    # --- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        gradients = {m.name: self.gradient(m) for m in self.matrices}
        self.refresh(gradients, step, lr_factor, after_update=False)
        for bucket in self.buckets:
            projected = []
            for m in bucket:
                a = gradients[m.name]
                projected.append(self._project(m, a, self.basis(m)))
                if m.name in self.bases.record.unobserved:
                    self.record_energy(m, a, projected[-1])
            self.apply(bucket, [gradients[m.name] for m in bucket], projected, step, lr)
        if self.subspace.sampler.lagged:
            self.refresh(gradients, step, lr_factor, after_update=True)

    def _project(self, matrix: Matrix, gradient: Tensor, basis: Tensor) -> Tensor:
        """R = A Q in float32 at least."""
        dtype = work_dtype(gradient.dtype)
        projected = torch.empty(matrix.num_rows, matrix.rank, dtype=dtype, device=gradient.device)
        project_(projected, gradient, basis)
        return matrix.shard.sum_(projected) if matrix.by_columns else projected

    def record_energy(self, matrix: Matrix, gradient: Tensor, projected: Tensor) -> None:
        """What a new basis captures of the gradient; after each refresh."""
        if not self.subspace.sampler.orthonormal:
            basis = orthonormalised(self.bases[matrix.name].to(work_dtype(self.basis_dtype)))
            projected = self._project(matrix, gradient, matrix.columns_of(basis))
        copies = matrix.shard.pieces if matrix.by_columns else 1
        self.bases.record.observe(matrix.name, gradient, projected, copies)

    def refresh(
        self, gradients: dict[str, Tensor], step: int, lr_factor: float, *, after_update: bool
    ) -> None:
        """Draw the bases that are due."""
        due = [m for m in self.matrices if self.bases.due(m.name, step, after_update=after_update)]
        sources = {
            m.name: GradientSource(
                partial(self.sampled_gradient, m, gradients[m.name], step), m.shard, m.side, m.by_columns
            )
            for m in due
        }
        for name, change in self.bases.refresh_all(sources, step, lr_factor).items():
            self.basis_changed(self.by_name[name], change, step)

    def begins_round(self, step: int) -> bool:
        return self.bases.schedule.draw_index(0, step) is not None

    def resume(self) -> None:
        self.bases.resume()

    def metrics(self) -> dict[str, float]:
        return self.bases.record.metrics()

    def ranks(self) -> list[int]:
        return [m.rank for m in self.matrices]
