"""Gram matrices for samplers, of matrices or sums that are distributed over ranks.

A basis is sampled in one of two ways: on every rank, with all-reduced products of the Gram matrix, so that
all ranks get the same basis; or on one rank, the owner, which gathers the matrix and broadcasts the basis.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rsotrain.parallel.sharding import Shard
from rsotrain.subspace.gram import DenseGram, GradientGram, Gram, Scaled, TrackedGram, largest_entry
from rsotrain.subspace.projection import Side, oriented


class Source(Protocol):
    """A matrix whose Gram matrix a sampler needs; this is None if not finite. All ranks call together."""

    @property
    def cost(self) -> float:
        """Operations that sampling takes."""
        ...

    @property
    def elements(self) -> int:
        """Elements that the owner gathers."""
        ...

    @property
    def kind(self) -> Hashable:
        """Sources of one kind can be in one batch."""
        ...

    def everywhere(self) -> Gram | None:
        """The Gram matrix on every rank."""
        ...

    def at(self, owner: int) -> Callable[[], Gram | None]:
        """Begin to gather on ``owner``. The returned function waits: the Gram matrix there, else None."""
        ...

    def matrix(self) -> Tensor:
        """What ``everywhere`` takes the Gram matrix of, on this rank."""
        ...

    def matrix_at(self, owner: int) -> Callable[[], Tensor | None]:
        """The same of ``at``."""
        ...

    @staticmethod
    def together(sources: Sequence[Any], matrices: Sequence[Tensor], *, whole: bool) -> Gram:
        """The Gram matrices of sources of one kind, whose ``matrices`` are whole or this rank's, as a batch.

        They may be not finite or zero; the host is not told.
        """
        ...


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """n×M×k, each in the memory layout of the first; one alone is not copied."""
    if len(matrices) == 1:
        return matrices[0].unsqueeze(0)
    transposed = matrices[0].stride(-2) < matrices[0].stride(-1)
    return torch.stack([m.mT for m in matrices]).mT if transposed else torch.stack(list(matrices))


def spread(costs: list[float], num_ranks: int) -> list[int]:
    """An owner for each of ``costs``: the largest first, each to the rank with the least load so far."""
    loads, owners = [0.0] * num_ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners


class GradientSource:
    """A gradient. ``gradient()``: this rank's piece, oriented; ``by_columns``: it is sharded in k."""

    def __init__(self, gradient: Callable[[], Tensor], shard: Shard, side: Side, by_columns: bool) -> None:
        self.gradient, self.shard, self.side, self.by_columns = gradient, shard, side, by_columns
        rows, size = max(shard.shape), min(shard.shape)
        self.elements = rows * size
        self.cost = float(2 * rows * size**2 + 10 * size**3)  # Gram matrix, eigenvectors
        self.kind = (shard.shape, shard.dim, side)

    def everywhere(self) -> Gram | None:
        matrix = self.matrix()
        if self.shard.dim is None or self.by_columns:
            return GradientGram.of_finite(matrix)
        return SummedGram.of_finite(matrix, self.shard)

    def at(self, owner: int) -> Callable[[], Gram | None]:
        whole = self.matrix_at(owner)

        def gram() -> Gram | None:
            matrix = whole()
            return None if matrix is None else GradientGram.of_finite(matrix)

        return gram

    def matrix(self) -> Tensor:
        piece = self.gradient()
        if not self.by_columns:
            return piece
        return oriented(self.shard.all_gather(oriented(piece, self.side)), self.side)

    def matrix_at(self, owner: int) -> Callable[[], Tensor | None]:
        rank, pieces = dist.get_rank(), self.shard.pieces
        if rank // pieces != owner // pieces:  # the owner is in another replica
            return lambda: None
        gathered = self.shard.gather(oriented(self.gradient(), self.side), owner % pieces)

        def matrix() -> Tensor | None:
            whole = gathered()
            if rank != owner:
                return None
            assert whole is not None
            return oriented(whole, self.side)

        return matrix

    @staticmethod
    def together(
        sources: "Sequence[GradientSource]", matrices: Sequence[Tensor], *, whole: bool
    ) -> "GradientGram | SummedGram":
        first = sources[0]
        if whole or first.shard.dim is None or first.by_columns:
            return GradientGram(stacked(matrices))
        return SummedGram(stacked(matrices), first.shard)


class TrackedSource:
    """A gradient together with what is remembered of earlier ones: ``weight`` · U S Uᵀ (``TrackedGram``)."""

    def __init__(self, source: GradientSource, basis: Tensor, tracked: Tensor, weight: float) -> None:
        self.source, self.basis, self.tracked, self.weight = source, basis, tracked, weight
        self.elements, self.cost, self.kind = source.elements, source.cost, ("tracked", source.kind)
        self.matrix, self.matrix_at = source.matrix, source.matrix_at

    def everywhere(self) -> Gram | None:
        return self._tracked(self.source.everywhere())

    def at(self, owner: int) -> Callable[[], Gram | None]:
        gathered = self.source.at(owner)
        return lambda: self._tracked(gathered())

    def _tracked(self, gram: Gram | None) -> Gram | None:
        if gram is None:
            return None
        assert isinstance(gram, GradientGram | SummedGram)
        return TrackedGram(gram, gram.largest, self.basis, self.tracked, self.weight)

    @staticmethod
    def together(
        sources: "Sequence[TrackedSource]", matrices: Sequence[Tensor], *, whole: bool
    ) -> TrackedGram:
        gram = GradientSource.together([s.source for s in sources], matrices, whole=whole)
        basis, tracked = (torch.stack(t) for t in zip(*((s.basis, s.tracked) for s in sources), strict=True))
        return TrackedGram(gram, gram.largest, basis, tracked, sources[0].weight)


class SumSource:
    """A Gram matrix (k×k) that is a sum over ranks; each rank's ``summand()`` may be overwritten."""

    def __init__(self, summand: Callable[[], Tensor], size: int, shared: bool) -> None:
        self.summand, self.shared = summand, shared
        self.elements = size**2
        self.cost = float(10 * size**3)
        self.kind = size

    def everywhere(self) -> Gram | None:
        return DenseGram.of_finite(self.matrix())

    def at(self, owner: int) -> Callable[[], Gram | None]:
        whole = self.matrix_at(owner)

        def gram() -> Gram | None:
            matrix = whole()
            return None if matrix is None else DenseGram.of_finite(matrix)

        return gram

    def matrix(self) -> Tensor:
        matrix = self.summand()
        if self.shared:
            dist.all_reduce(matrix)
        return matrix

    def matrix_at(self, owner: int) -> Callable[[], Tensor | None]:
        summand = self.summand()
        work = dist.reduce(summand, dst=owner, async_op=True)
        assert work is not None

        def matrix() -> Tensor | None:
            work.wait()
            return summand if dist.get_rank() == owner else None

        return matrix

    @staticmethod
    def together(sources: "Sequence[SumSource]", matrices: Sequence[Tensor], *, whole: bool) -> DenseGram:
        return DenseGram(stacked(matrices))


class SummedGram(Scaled):
    """A GradientGram of a gradient whose rows are sharded over the ranks of ``shard``, scaled alike.

    Each method all-reduces its result.
    """

    def __init__(self, gradient: Tensor, shard: Shard) -> None:
        self.size = gradient.shape[-1]
        self.resolution = torch.finfo(gradient.dtype).eps
        self.shard = shard
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        largest = largest_entry(gradient).to(dtype)  # an all-reduced maximum may lose a NaN, but no infinity
        self.largest = torch.where(largest.isfinite(), largest, torch.inf)
        dist.all_reduce(self.largest, dist.ReduceOp.MAX, group=shard.group)
        self.piece = GradientGram(gradient, self.largest)
        self.eigen_dtype = self.piece.eigen_dtype
        self._energy: Tensor | None = None

    @classmethod
    def of_finite(cls, gradient: Tensor, shard: Shard) -> "SummedGram | None":
        gram = cls(gradient, shard)
        return gram if gram.is_finite else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.shard.sum_(self.piece.matrix(dtype))

    def matmul(self, block: Tensor) -> Tensor:
        return self.shard.sum_(self.piece.matmul(block))

    def energy(self) -> Tensor:
        if self._energy is None:
            self._energy = self.shard.sum_(self.piece.energy().clone())
        return self._energy

    def diagonal(self) -> Tensor:
        return self.shard.sum_(self.piece.diagonal())

    def factor(self) -> Tensor | None:
        return None
