"""The step that all low-rank methods share: refresh, project, hand over to the method."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config import OnRefresh
from rsotrain.optim.base import Part, Settings, buckets, gradient_of, work_dtype
from rsotrain.subspace.bases import Bases, BasisChange
from rsotrain.subspace.gram import GradientGram
from rsotrain.subspace.projection import Side, oriented, project_, resolve_rank, side_of
from rsotrain.subspace.samplers import Sampler


@dataclass(frozen=True)
class Subspace:
    """How the bases of a part are chosen.

    ``rank``: as in ``resolve_rank``. ``gap``: optimizer steps between refreshes. ``seed``: the run's.
    ``compute_dtype``: of the projections and of the stored bases; None: at least float32. A basis that
    is itself optimised (a lagged sampler's) is float32 whatever this says.
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
    """One low-rank parameter. Oriented, it is M×k, with M = ``num_rows``."""

    name: str
    parameter: nn.Parameter
    side: Side
    rank: int

    @property
    def num_rows(self) -> int:
        return max(self.parameter.shape)

    @property
    def size(self) -> int:
        return min(self.parameter.shape)

    @property
    def weight(self) -> Tensor:
        return oriented(self.parameter.data, self.side)


class SubspacePart(Part):
    """A method with one low-rank basis for each matrix.

    Matrices are updated in buckets: one matrix product each for the projections, then the elementwise
    work of the whole bucket in fused or foreach calls. ``needs_orthonormal``: the method makes no sense
    with other bases; ``full_precision``: nor with projections in less than float32.
    """

    needs_orthonormal: ClassVar[bool] = False
    full_precision: ClassVar[bool] = False

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        subspace: Subspace,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings)
        self.subspace = subspace
        self.matrices = [
            Matrix(name, p, side_of(p.shape), resolve_rank(subspace.rank, min(p.shape), name))
            for name, p in parameters.items()
        ]
        dtype = next(iter(parameters.values())).dtype
        self.basis_dtype = work_dtype(dtype)
        exact = self.full_precision or subspace.sampler.lagged
        if subspace.compute_dtype is not None and not exact:
            self.basis_dtype = subspace.compute_dtype
        self.bases = Bases(
            {m.name: (m.size, m.rank) for m in self.matrices},
            subspace.sampler,
            gap=subspace.gap,
            staggered=subspace.staggered,
            seed=subspace.seed,
            total_steps=subspace.total_steps,
            dtype=self.basis_dtype,
            devices={m.name: m.parameter.device for m in self.matrices},
        )
        for m in self.matrices:
            self.state[m.name] = self.bases.state[m.name] | self.initial_state(m)
        self.buckets = buckets(self.matrices, lambda m: m.num_rows * m.rank)

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
        for bucket in self.buckets:
            gradients = [self.gradient(m) for m in bucket]
            self._refresh(bucket, gradients, step, lr_factor, after_update=False)
            projected = [
                torch.empty(m.num_rows, m.rank, dtype=work_dtype(a.dtype), device=a.device)
                for m, a in zip(bucket, gradients, strict=True)
            ]
            for i, (m, a) in enumerate(zip(bucket, gradients, strict=True)):
                project_(projected[i], a, self.bases[m.name])
                if m.name in self.bases.unobserved:
                    self.bases.observe(m.name, a, projected[i])
            self.apply(bucket, gradients, projected, step, lr)
            if self.subspace.sampler.lagged:
                self._refresh(bucket, gradients, step, lr_factor, after_update=True)

    def _refresh(
        self,
        bucket: list[Matrix],
        gradients: list[Tensor],
        step: int,
        lr_factor: float,
        *,
        after_update: bool,
    ) -> None:
        """Draw the bases that are due."""
        for m, a in zip(bucket, gradients, strict=True):
            if not self.bases.due(m.name, step, after_update=after_update):
                continue

            def gram(m: Matrix = m, a: Tensor = a) -> GradientGram | None:
                return GradientGram.of_finite(self.sampled_gradient(m, a, step))

            change = self.bases.refresh(m.name, gram, step, lr_factor)
            if change is not None:
                self.basis_changed(m, change, step)

    def resume(self, step: int) -> None:
        self.bases.resume(step)

    def metrics(self) -> dict[str, float]:
        return self.bases.metrics()

    def describe_rank(self) -> str:
        ranks = sorted({m.rank for m in self.matrices})
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
