"""What a sampler may see of one matrix, where the matrix or its sum is spread over ranks.

Two ways: on every rank, with products of the Gram matrix that are summed in all-reduces, so that all draw
the same; or on one rank, the owner, where the matrix is gathered, and which then broadcasts what it drew.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rsotrain.parallel.sharding import Shard
from rsotrain.subspace.gram import DenseGram, GradientGram, Gram, largest_entry
from rsotrain.subspace.projection import Side, oriented


class Source(Protocol):
    """A Gram is None where the gradient (or the sum) is not finite. All ranks call these together."""

    @property
    def cost(self) -> float:
        """Of a draw, in operations."""
        ...

    @property
    def elements(self) -> int:
        """That the owner holds."""
        ...

    def everywhere(self) -> Gram | None:
        """For drawing on every rank."""
        ...

    def at(self, owner: int) -> Callable[[], Gram | None]:
        """For drawing on the rank ``owner`` alone; None elsewhere. Begins to send; what it returns waits."""
        ...


def spread(costs: list[float], num_ranks: int) -> list[int]:
    """An owner for each: the dearest first, each to the rank with the least so far."""
    loads, owners = [0.0] * num_ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(num_ranks), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners


class GradientSource:
    """A gradient. ``gradient()``: oriented, of it the piece that ``shard`` says; ``by_columns``: in k."""

    def __init__(self, gradient: Callable[[], Tensor], shard: Shard, side: Side, by_columns: bool) -> None:
        self.gradient, self.shard, self.side, self.by_columns = gradient, shard, side, by_columns
        rows, size = max(shard.shape), min(shard.shape)
        self.elements = rows * size
        self.cost = float(2 * rows * size**2 + 10 * size**3)  # Gram matrix, eigenvectors

    def everywhere(self) -> Gram | None:
        piece = self.gradient()
        if self.shard.dim is None:
            return GradientGram.of_finite(piece)
        if self.by_columns:
            return GradientGram.of_finite(
                oriented(self.shard.all_gather(oriented(piece, self.side)), self.side)
            )
        return SummedGram.of_finite(piece, self.shard)

    def at(self, owner: int) -> Callable[[], Gram | None]:
        rank, pieces = dist.get_rank(), self.shard.pieces
        if rank // pieces != owner // pieces:  # another replica's
            return lambda: None
        gathered = self.shard.gather(oriented(self.gradient(), self.side), owner % pieces)

        def gram() -> Gram | None:
            whole = gathered()
            if rank != owner:
                return None
            assert whole is not None
            return GradientGram.of_finite(oriented(whole, self.side))

        return gram


class SumSource:
    """A Gram matrix k×k to which every rank has gathered its own summand, whose memory is used."""

    def __init__(self, summand: Callable[[], Tensor], size: int, shared: bool) -> None:
        self.summand, self.shared = summand, shared
        self.elements = size**2
        self.cost = float(10 * size**3)

    def everywhere(self) -> Gram | None:
        matrix = self.summand()
        if self.shared:
            dist.all_reduce(matrix)
        return _dense(matrix)

    def at(self, owner: int) -> Callable[[], Gram | None]:
        matrix = self.summand()
        work = dist.reduce(matrix, dst=owner, async_op=True)
        assert work is not None

        def gram() -> Gram | None:
            work.wait()
            return _dense(matrix) if dist.get_rank() == owner else None

        return gram


def _dense(matrix: Tensor) -> DenseGram | None:
    return DenseGram(matrix) if bool(matrix.isfinite().all()) else None


class SummedGram:
    """As GradientGram, of a gradient whose rows are spread over the ranks of ``shard``; scaled alike.

    Each method is one all-reduce of what it returns.
    """

    def __init__(self, gradient: Tensor, shard: Shard) -> None:
        self.size = gradient.shape[1]
        self.resolution = torch.finfo(gradient.dtype).eps
        self.shard = shard
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        largest = largest_entry(gradient).to(dtype)  # a maximum over ranks may lose a NaN
        self.largest = torch.where(largest.isfinite(), largest, torch.inf)
        dist.all_reduce(self.largest, dist.ReduceOp.MAX, group=shard.group)
        self.piece = GradientGram(gradient, self.largest)
        self._energy: Tensor | None = None

    @classmethod
    def of_finite(cls, gradient: Tensor, shard: Shard) -> "SummedGram | None":
        gram = cls(gradient, shard)
        return gram if bool(gram.largest.isfinite()) else None

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
