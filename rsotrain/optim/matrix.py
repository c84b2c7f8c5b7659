"""A parameter with a low-rank basis: which side is projected, and which piece this rank has."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsotrain.optim.functional import row_norms, subset_sums
from rsotrain.optim.stacks import in_stacks, norms_of_each, norms_of_wholes, stacked
from rsotrain.parallel.sharding import Shard, local, shard_of, sums_of_rows
from rsotrain.subspace.projection import Side, oriented, side_of


@dataclass(frozen=True)
class Matrix:
    """A parameter with a low-rank basis. Oriented, it is M×k; this rank has some rows or columns.

    Where the parameter is sharded in M, only sums over M need communication. Where it is sharded in k, sums
    over k are all-reduced, and M×r tensors are the same on every rank.
    """

    name: str
    parameter: nn.Parameter
    side: Side
    rank: int
    shard: Shard

    @property
    def size(self) -> int:
        """k of the whole matrix."""
        return min(self.shard.shape)

    @property
    def by_columns(self) -> bool:
        """Is the matrix sharded in k, the projected dimension?"""
        return self.shard.dim == (1 if self.side is Side.right else 0)

    @property
    def num_rows(self) -> int:
        if self.shard.dim is None or self.by_columns:
            return max(self.shard.shape)
        return self.shard.stop - self.shard.start

    @property
    def rows_dim(self) -> int | None:
        """The dimension in which M×r tensors are sharded; None: they are replicated."""
        return None if self.by_columns else 0

    @property
    def weight(self) -> Tensor:
        return oriented(local(self.parameter).detach(), self.side)

    def columns_of(self, basis: Tensor) -> Tensor:
        """The rows of a k×r basis that belong to this rank's columns."""
        return basis[self.shard.start : self.shard.stop] if self.by_columns else basis

    def norms(self, *pieces: Tensor) -> list[Tensor]:
        """Frobenius norms of n whole matrices, (n,), from stacks of this rank's pieces.

        All pieces are (n, M, k), or all (n, M, r), of matrices that are sharded like this one.
        """
        return norms_of_wholes(self.shard, *pieces)

    def low_rank_norms(self, *pieces: Tensor) -> list[Tensor]:
        """The same of whole M×r tensors."""
        return [norms_of_each(p) for p in pieces] if self.by_columns else self.norms(*pieces)

    def row_norms(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """Norms of the rows of whole M×k matrices, …×num_rows×1."""
        norms = row_norms(piece, dtype)
        return self.shard.sum_(norms.square_()).sqrt_() if self.by_columns else norms

    def subset_sums(self, piece: Tensor, subset_size: int) -> Tensor:
        """``subset_sums`` of whole M×k matrices, …×num_rows×(k/subset_size)."""
        if not self.by_columns:
            return subset_sums(piece, subset_size)
        sums = piece.new_zeros(*piece.shape[:-1], self.size // subset_size)
        subsets = self.subsets_of_columns(subset_size)
        assert subsets is not None
        return self.shard.sum_(sums.index_add_(-1, subsets, piece.square()))

    def subsets_of_columns(self, subset_size: int) -> Tensor | None:
        """The subset of each of this rank's columns; None where it has all columns."""
        if not self.by_columns:
            return None
        columns = torch.arange(self.shard.start, self.shard.stop, device=self.parameter.device)
        return columns // subset_size


def matrix_of(name: str, parameter: nn.Parameter, rank: int = 1) -> Matrix:
    shard = shard_of(parameter)
    return Matrix(name, parameter, side_of(parameter.shape), rank, shard)


def grams_of_rows(matrices: list[Matrix], low_rank: list[Tensor]) -> list[Tensor]:
    """RᵀR (r×r) of whole M×r tensors, from this rank's pieces; one all-reduce for all that are sharded."""
    if in_stacks(low_rank[0].device):  # where all matrices have one shape
        stack = stacked(low_rank)
        grams = list(torch.bmm(stack.mT, stack).unbind())
    else:
        grams = [r.T @ r for r in low_rank]
    # where a matrix is sharded by columns, its M×r tensors are the same on all ranks
    split = [i for i, m in enumerate(matrices) if not m.by_columns]
    if split:
        sums = sums_of_rows([grams[i] for i in split], [matrices[i].shard for i in split])
        for i, total in zip(split, sums, strict=True):
            grams[i] = total
    return grams
