"""One low-rank parameter: which side is projected, and which piece of it this rank has."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsotrain.optim.functional import row_norms, subset_sums
from rsotrain.parallel.sharding import Shard, local, shard_of
from rsotrain.subspace.projection import Side, oriented, side_of


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
    def rows_dim(self) -> int | None:
        """The dimension in which what is M×r is divided among ranks; None: it is the same on all."""
        return None if self.by_columns else 0

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
