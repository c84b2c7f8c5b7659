"""The size of the optimizer state in closed form, from shapes alone. It checks the size of the real tensors.

Each method lists the moments and other tensors that it keeps for one matrix (``matrix_state``). This module
computes their bytes on the rank with the largest pieces.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from rsotrain.config.choices import StateDtype
from rsotrain.models.architecture import Weight
from rsotrain.optim.blocks import block_dim, block_size
from rsotrain.parallel.sharding import preferred_dim
from rsotrain.subspace.numbered import number_dtype

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateSize:
    """``moments``: shapes on the rank. ``bases``: (k, r) of each. ``wide``: other elements, in float32."""

    moments: tuple[Shape, ...] = ()
    bases: tuple[tuple[int, int], ...] = ()
    wide: int = 0


@dataclass(frozen=True)
class MatrixSize:
    """One matrix, oriented M×k with M ≥ k, on the rank with the largest piece.

    ``piece``: the shape of the piece, not oriented. ``size``: k. ``rows``: the rows of an M×r tensor on the
    rank, all M where the projected dimension k is sharded. ``shape``: of the whole, not oriented.
    ``by_rows``: is it sharded by its rows in any case?
    """

    name: str
    shape: Shape
    piece: Shape
    size: int
    rows: int
    by_rows: bool = False


@dataclass(frozen=True)
class WeightsLayout:
    """How weights and optimizer state are stored. ``pieces``: ranks that share one copy. ``state_dtype``: of
    moments. ``basis_bytes``: bytes of an element of a basis, in the dtype of products.
    ``bases_are_optimised``: a sampler moves them by small steps, for which some methods keep them in float32.
    ``numbered``: the state holds the numbers of a basis' columns in its place.
    ``sampler_state(k, r)``: bytes of the sampler's own tensors for a k×r basis.
    """

    pieces: int
    state_dtype: StateDtype
    basis_bytes: int = 0
    bases_are_optimised: bool = False
    numbered: bool = False
    sampler_state: Callable[[int, int], int] = lambda size, rank: 0

    def piece(self, shape: Shape, *, rows: bool = False) -> Shape:
        """Shape of the largest piece; ``rows``: shard the first dimension in any case."""
        dim = preferred_dim(shape, self.pieces, rows=rows)
        return tuple(-(-n // self.pieces) if i == dim else n for i, n in enumerate(shape))

    def matrix(self, weight: Weight, *, by_rows: bool = False) -> MatrixSize:
        shape, piece = weight.shape, self.piece(weight.shape, rows=by_rows)
        if len(shape) < 2:
            return MatrixSize(weight.name, shape, piece, piece[0], 1, by_rows)
        right = shape[0] >= shape[1]
        by_columns = preferred_dim(shape, self.pieces, rows=by_rows) == (1 if right else 0)
        rows = max(shape) if by_columns else -(-max(shape) // self.pieces)
        return MatrixSize(weight.name, shape, piece, min(shape), rows, by_rows)

    def moment_bytes(self, shape: Shape, matrix: MatrixSize | None = None) -> int:
        """Of a moment like the piece of ``matrix`` if it has its shape, else of one sharded by rows."""
        count = math.prod(shape)
        if self.state_dtype is StateDtype.int8:
            like_matrix = matrix is not None and shape == matrix.piece
            dim = 1
            if matrix is not None and like_matrix:
                dim = block_dim(matrix.shape, matrix.shape, rows=matrix.by_rows)
            if block := block_size(shape, dim):
                return count + 4 * count // block
        return (2 if self.state_dtype is StateDtype.bfloat16 else 4) * count

    def bytes_of(self, state: StateSize, matrix: MatrixSize | None = None) -> int:
        moments = sum(self.moment_bytes(shape, matrix) for shape in state.moments)
        bases = sum(self._bytes_of_basis(k, r) + self.sampler_state(k, r) for k, r in state.bases)
        return moments + bases + 4 * state.wide

    def _bytes_of_basis(self, size: int, rank: int) -> int:
        return rank * (number_dtype(size).itemsize if self.numbered else self.basis_bytes * size)
