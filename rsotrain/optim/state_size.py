"""The size of the optimizer state in closed form, from shapes alone: the check on what is really kept.

Each method says how many moments and other tensors it keeps of one matrix (``matrix_state``); what these
take is worked out here, on the rank that has the largest pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rsotrain.config.methods import StateDtype
from rsotrain.models.architecture import Weight
from rsotrain.parallel.sharding import preferred_dim

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StateSize:
    """``moments``: shapes on the rank. ``bases``: (k, r) of each. ``wide``: elements in float32."""

    moments: tuple[Shape, ...] = ()
    bases: tuple[tuple[int, int], ...] = ()
    wide: int = 0


@dataclass(frozen=True)
class MatrixSize:
    """One matrix, oriented M×k with M ≥ k, on the rank with the largest piece.

    ``piece``: the shape of the piece as it lies. ``rows``: those of what is M×r: all of them where the
    projected dimension is the one that is sharded.
    """

    name: str
    piece: Shape
    size: int
    rows: int


@dataclass(frozen=True)
class WeightsLayout:
    """How weights and states lie: ``pieces`` ranks share a copy; ``state_dtype``: of moments;
    ``basis_bytes``: of a basis' element, in the dtype of products; ``bases_are_optimised``: moved by small
    steps, for which some methods keep them in float32; ``sampler_state(k, r)``: bytes that the sampler keeps.
    """

    pieces: int
    state_dtype: StateDtype
    basis_bytes: int = 0
    bases_are_optimised: bool = False
    sampler_state: Callable[[int, int], int] = lambda size, rank: 0

    def piece(self, shape: Shape, *, rows: bool = False) -> Shape:
        """That of the largest piece; ``rows``: sharded in the first dimension in any case."""
        dim = preferred_dim(shape, self.pieces, rows=rows)
        return tuple(-(-n // self.pieces) if i == dim else n for i, n in enumerate(shape))

    def matrix(self, weight: Weight) -> MatrixSize:
        shape, piece = weight.shape, self.piece(weight.shape)
        if len(shape) < 2:
            return MatrixSize(weight.name, piece, piece[0], 1)
        right = shape[0] >= shape[1]
        by_columns = preferred_dim(shape, self.pieces, rows=False) == (1 if right else 0)
        rows = max(shape) if by_columns else -(-max(shape) // self.pieces)
        return MatrixSize(weight.name, piece, min(shape), rows)

    def moment_bytes(self, shape: Shape) -> int:
        count = 1
        for n in shape:
            count *= n
        return (2 if self.state_dtype is StateDtype.bfloat16 else 4) * count

    def bytes_of(self, state: StateSize) -> int:
        moments = sum(self.moment_bytes(shape) for shape in state.moments)
        bases = sum(self.basis_bytes * k * r + self.sampler_state(k, r) for k, r in state.bases)
        return moments + bases + 4 * state.wide
