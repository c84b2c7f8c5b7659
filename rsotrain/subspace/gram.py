"""What a data-dependent sampler may see: the Gram matrix of the projected side, or products with it.

Both sum over the dimension that is not projected, so a sharded matrix needs one all-reduce of a k×k (or
k×r) matrix and nothing else.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 23  # bounds the float64 temporaries of blockwise sums
# A symmetric product is made of its lower blocks: of n in a row, (n + 1)/2n of the operations of the whole.
_SYMMETRIC_BLOCKS = 8
_LEAST_WIDTH = 128  # of a block: narrower products run below the device's rate


def _lower_blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of each column of blocks, from the diagonal down."""
    width = max(_LEAST_WIDTH, -(-size // _SYMMETRIC_BLOCKS))
    for start in range(0, size, width):
        yield slice(start, size), slice(start, min(start + width, size))


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """total ← total + AᵀA in its lower blocks; what is above them is left. total: k×k, rows: A, M×k."""
    for below, columns in _lower_blocks(total.shape[0]):
        total[below, columns].addmm_(rows[:, below].T, rows[:, columns])


def mirrored_(total: Tensor) -> Tensor:
    """``total``, what is above its lower blocks overwritten by the transpose of what is below them."""
    for _, columns in _lower_blocks(total.shape[0]):
        total[columns, columns.stop :] = total[columns.stop :, columns].T
    return total


def largest_entry(matrix: Tensor) -> Tensor:
    """max |A|, 0-d, of ``matrix`` or a transposed view; NaN if an entry is."""
    if matrix.numel() == 0:
        return matrix.new_zeros(())
    # one pass, and fast only over what lies in order; torch's norm of infinite order takes ten times as long
    lowest, highest = torch.aminmax(matrix if matrix.is_contiguous() else matrix.T)
    return torch.maximum(-lowest, highest)


class Gram(Protocol):
    """The Gram matrix AᵀA (k×k) of an oriented matrix A (M×k).

    ``resolution``: relative size below which A's own entries are rounding noise.
    """

    size: int
    resolution: float

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """AᵀA, accumulated in ``dtype``."""
        ...

    def matmul(self, block: Tensor) -> Tensor:
        """AᵀA X for a ``block`` X of k×r in float32."""
        ...

    def energy(self) -> Tensor:
        """‖A‖_F², 0-d."""
        ...

    def diagonal(self) -> Tensor:
        """Squared column norms of A, k."""
        ...

    def factor(self) -> Tensor | None:
        """A itself in float64, for an exact decomposition; None where only the Gram matrix is known."""
        ...


class GradientGram:
    """Of a gradient, scaled to a largest entry of 1 so that no square under- or overflows.

    ``gradient``: oriented, M×k, any float dtype, finite. ``largest``: of the whole, for a piece of it.
    """

    def __init__(self, gradient: Tensor, largest: Tensor | None = None) -> None:
        self.size = gradient.shape[1]
        self.resolution = torch.finfo(gradient.dtype).eps
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        if largest is None:
            largest = largest_entry(gradient).to(dtype)
        self.largest = largest
        # divided by it, not times its reciprocal, which is infinite for subnormal gradients
        self.normalised = gradient.to(dtype) / torch.where(self.largest > 0, self.largest, 1.0)
        self._energy: Tensor | None = None

    @classmethod
    def of_finite(cls, gradient: Tensor) -> "GradientGram | None":
        """None if an entry is NaN or infinite; asking synchronises with the device."""
        gram = cls(gradient)
        return gram if bool(gram.largest.isfinite()) else None

    def _blocks(self) -> Iterator[Tensor]:
        rows = max(1, _BLOCK_ELEMENTS // self.size)
        for block in self.normalised.split(rows):
            yield block.to(torch.float64)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        total = self.normalised.new_zeros((self.size, self.size), dtype=dtype)
        if dtype is torch.float32:
            add_gram_(total, self.normalised.to(dtype))
        else:
            for block in self._blocks():
                add_gram_(total, block)
        return mirrored_(total)

    def matmul(self, block: Tensor) -> Tensor:
        return (self.normalised.T @ (self.normalised @ block.to(self.normalised.dtype))).to(block.dtype)

    def energy(self) -> Tensor:
        if self._energy is None:
            # float32 holds the sum of a column well enough, not that of all; a float64 copy takes long
            along = 0 if self.normalised.stride(0) == 1 else 1
            norms = torch.linalg.vector_norm(self.normalised, dim=along)
            self._energy = norms.double().square_().sum()
        return self._energy

    def diagonal(self) -> Tensor:
        return torch.linalg.vector_norm(self.normalised, dim=0, dtype=torch.float64).square()

    def factor(self) -> Tensor | None:
        return self.normalised.to(torch.float64)


class DenseGram:
    """A Gram matrix that was gathered elsewhere; ``matrix``: k×k, symmetric, finite."""

    def __init__(self, matrix: Tensor) -> None:
        self.size = matrix.shape[0]
        self.resolution = torch.finfo(matrix.dtype).eps
        largest = matrix.abs().amax()
        self.normalised = matrix / torch.where(largest > 0, largest, 1.0)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.normalised.to(dtype)

    def matmul(self, block: Tensor) -> Tensor:
        return self.normalised.to(block.dtype) @ block

    def energy(self) -> Tensor:
        return self.normalised.trace().to(torch.float64)

    def diagonal(self) -> Tensor:
        return self.normalised.diagonal().to(torch.float64)

    def factor(self) -> Tensor | None:
        return None
