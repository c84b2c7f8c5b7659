"""The data of data-dependent samplers: the Gram matrix AᵀA of the projected side, or products with it.

Both sum over the dimension that is not projected, so a sharded A needs only one all-reduce of a k×k (or k×r)
matrix. All work alike on one matrix and on a batch of n of one shape, whose tensors have n first.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

# Bound the float64 temporaries of blockwise sums, of one matrix and of a batch.
_BLOCK_ELEMENTS, _BATCH_BLOCK_ELEMENTS = 1 << 23, 1 << 21
# Only the lower blocks of a symmetric product are computed: with n×n blocks (n + 1)/2n of all operations.
_SYMMETRIC_BLOCKS = 8
_LEAST_WIDTH = 128  # of a block; narrower products are slower per operation


def _lower_blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of each block column, from the diagonal down."""
    width = max(_LEAST_WIDTH, -(-size // _SYMMETRIC_BLOCKS))
    for start in range(0, size, width):
        yield slice(start, size), slice(start, min(start + width, size))


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """total ← total + AᵀA in its lower blocks only. ``total``: k×k; ``rows``: A, M×k.

    Rows in bfloat16 are multiplied as they are, which is exact, and summed in the dtype of ``total``.
    """
    for below, columns in _lower_blocks(total.shape[-1]):
        block, left, right = total[..., below, columns], rows[..., below].mT, rows[..., columns]
        if rows.dtype is not total.dtype:
            block.add_(torch.mm(left, right, out_dtype=total.dtype))
        elif total.dim() == 2:
            block.addmm_(left, right)
        else:
            block.baddbmm_(left, right)


def mirrored_(total: Tensor) -> Tensor:
    """``total`` (k×k) with its lower blocks copied to the upper ones, transposed; in place."""
    for _, columns in _lower_blocks(total.shape[-1]):
        total[..., columns, columns.stop :] = total[..., columns.stop :, columns].mT
    return total


def largest_entry(matrix: Tensor) -> Tensor:
    """max |A|, 0-d; NaN if an entry is NaN. ``matrix``: contiguous, or the transpose of such a tensor."""
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-2])
    # aminmax is fast on contiguous tensors only; torch's norm of infinite order takes ten times as long
    rows = matrix if matrix.is_contiguous() else matrix.mT
    lowest, highest = torch.aminmax(rows) if matrix.dim() == 2 else torch.aminmax(rows.flatten(-2), dim=-1)
    return torch.maximum(-lowest, highest)


def _entrywise(scalars: Tensor) -> Tensor:
    """A number for each matrix, to broadcast over its entries; that of one matrix stays 0-d."""
    return scalars if scalars.dim() == 0 else scalars[:, None, None]


def _trace(matrix: Tensor) -> Tensor:
    return matrix.trace() if matrix.dim() == 2 else matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


class Gram(Protocol):
    """The Gram matrix AᵀA (k×k) of an oriented matrix A (M×k).

    ``size``: k. ``resolution``: the relative size below which entries of A are rounding errors. ``is_zero``:
    is A zero? The host knows it. ``finite``, ``usable``: is A finite; is it finite and not zero? 0-d.
    ``eigen_dtype``: in which eigenvalues lose nothing that the data hold.
    """

    size: int
    resolution: float
    eigen_dtype: torch.dtype

    @property
    def is_zero(self) -> bool: ...

    @property
    def finite(self) -> Tensor: ...

    @property
    def usable(self) -> Tensor: ...

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


class Scaled:
    """A Gram matrix with the ``largest`` entry of A, 0-d on the device, which the host reads once."""

    largest: Tensor

    @cached_property
    def largest_value(self) -> float:
        """Synchronises with the device."""
        return float(self.largest)

    @property
    def finite(self) -> Tensor:
        return self.largest.isfinite()

    @property
    def usable(self) -> Tensor:
        return (self.largest > 0) & self.finite

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.largest_value)

    @property
    def is_zero(self) -> bool:
        return self.largest_value == 0


class GradientGram(Scaled):
    """The Gram matrix of a gradient, scaled to a largest entry of 1 so that no square under- or overflows.

    ``gradient``: oriented, M×k, any float dtype, finite. ``largest``: max |A| of the whole matrix, where
    ``gradient`` is a piece of it.
    """

    def __init__(self, gradient: Tensor, largest: Tensor | None = None) -> None:
        self.size = gradient.shape[-1]
        self.resolution = torch.finfo(gradient.dtype).eps
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        if largest is None:
            largest = largest_entry(gradient).to(dtype)
        self.largest = largest
        # the squares of what 8 bits resolve are as large as the errors of sums in float32
        self.eigen_dtype = torch.float32 if gradient.dtype.itemsize < 4 else torch.float64
        # a division, because the reciprocal of a subnormal number is infinite
        divisor = _entrywise(torch.where(self.largest > 0, self.largest, 1.0))
        wide = gradient.to(dtype)
        self.normalised = wide / divisor if wide.dtype is gradient.dtype else wide.div_(divisor)
        self._energy: Tensor | None = None

    @classmethod
    def of_finite(cls, gradient: Tensor) -> "GradientGram | None":
        """The Gram matrix, or None if an entry is not finite. The check synchronises with the device."""
        gram = cls(gradient)
        return gram if gram.is_finite else None

    def _blocks(self) -> Iterator[Tensor]:
        limit = _BLOCK_ELEMENTS if self.largest.dim() == 0 else _BATCH_BLOCK_ELEMENTS
        rows = max(1, limit // (self.size * self.largest.numel()))
        for block in self.normalised.split(rows, dim=-2):
            yield block.to(torch.float64)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        shape = (*self.normalised.shape[:-2], self.size, self.size)
        total = self.normalised.new_zeros(shape, dtype=dtype)
        if dtype is torch.float32:
            add_gram_(total, self.normalised.to(dtype))
        else:
            for block in self._blocks():
                add_gram_(total, block)
        return mirrored_(total)

    def matmul(self, block: Tensor) -> Tensor:
        return (self.normalised.mT @ (self.normalised @ block.to(self.normalised.dtype))).to(block.dtype)

    def energy(self) -> Tensor:
        if self._energy is None:
            # float32 is precise enough for the sum over a column, but not over all; a float64 copy is slow
            along = -2 if self.normalised.stride(-2) == 1 else -1
            norms = torch.linalg.vector_norm(self.normalised, dim=along)
            self._energy = norms.double().square_().sum(-1)
        return self._energy

    def diagonal(self) -> Tensor:
        return torch.linalg.vector_norm(self.normalised, dim=-2, dtype=torch.float64).square()

    def factor(self) -> Tensor | None:
        return self.normalised.to(torch.float64)


class TrackedGram:
    """AᵀA + weight · U S Uᵀ, a Gram matrix with what is remembered of earlier ones, scaled as that of A is.

    ``gram``: of A, whose ``largest`` entry scales it. ``basis``: U, k×r; ``tracked``: S, r×r, symmetric and
    positive, of gradients that are not scaled.
    """

    def __init__(self, gram: "Gram", largest: Tensor, basis: Tensor, tracked: Tensor, weight: float) -> None:
        self.gram, self.basis = gram, basis
        self.size, self.resolution, self.eigen_dtype = gram.size, gram.resolution, gram.eigen_dtype
        scale = _entrywise(torch.where(largest > 0, largest, 1.0).to(tracked.dtype))
        self.tracked = tracked / scale / scale * weight

    @property
    def is_zero(self) -> bool:
        return self.gram.is_zero and not bool(self.energy() > 0)

    @property
    def finite(self) -> Tensor:
        return self.gram.finite

    @property
    def usable(self) -> Tensor:
        return self.finite & (self.energy() > 0)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        basis = self.basis.to(dtype)
        return self.gram.matrix(dtype) + basis @ self.tracked.to(dtype) @ basis.mT

    def matmul(self, block: Tensor) -> Tensor:
        basis = self.basis.to(block.dtype)
        return self.gram.matmul(block) + basis @ (self.tracked.to(block.dtype) @ (basis.mT @ block))

    def energy(self) -> Tensor:
        return self.gram.energy() + _trace(self.tracked)

    def diagonal(self) -> Tensor:
        basis = self.basis.double()
        return self.gram.diagonal() + (basis @ self.tracked.double()).mul_(basis).sum(-1)

    def factor(self) -> Tensor | None:
        """A with rows S^½Uᵀ below it, whose Gram matrix this is."""
        factor = self.gram.factor()
        if factor is None:
            return None
        values, vectors = torch.linalg.eigh(self.tracked.to(factor.dtype))
        root = vectors * values.clamp(min=0).sqrt()
        return torch.cat([factor, root.T @ self.basis.to(factor.dtype).T])


class DenseGram(Scaled):
    """A Gram matrix that is given as such; ``matrix``: k×k, symmetric."""

    def __init__(self, matrix: Tensor) -> None:
        self.size = matrix.shape[-1]
        self.resolution = torch.finfo(matrix.dtype).eps
        self.eigen_dtype = matrix.dtype
        self.largest = matrix.abs().amax((-2, -1))  # NaN if an entry is NaN
        self.normalised = matrix / _entrywise(torch.where(self.largest > 0, self.largest, 1.0))

    @classmethod
    def of_finite(cls, matrix: Tensor) -> "DenseGram | None":
        """The same, or None if an entry is not finite. The check synchronises with the device."""
        gram = cls(matrix)
        return gram if gram.is_finite else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.normalised.to(dtype)

    def matmul(self, block: Tensor) -> Tensor:
        return self.normalised.to(block.dtype) @ block

    def energy(self) -> Tensor:
        return _trace(self.normalised).to(torch.float64)

    def diagonal(self) -> Tensor:
        return self.normalised.diagonal(dim1=-2, dim2=-1).to(torch.float64)

    def factor(self) -> Tensor | None:
        return None


class JoinedGram:
    """The Gram matrices of several batches as one batch; ``counts``: the matrices in each of ``grams``."""

    def __init__(self, grams: Sequence[Gram], counts: Sequence[int]) -> None:
        self.grams, self.counts = grams, list(counts)
        self.size, self.eigen_dtype = grams[0].size, grams[0].eigen_dtype
        self.resolution = max(gram.resolution for gram in grams)

    @property
    def is_zero(self) -> bool:
        return all(gram.is_zero for gram in self.grams)

    @property
    def finite(self) -> Tensor:
        return torch.cat([gram.finite for gram in self.grams])

    @property
    def usable(self) -> Tensor:
        return torch.cat([gram.usable for gram in self.grams])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([gram.matrix(dtype) for gram in self.grams])

    def matmul(self, block: Tensor) -> Tensor:
        blocks = block.split(self.counts)
        return torch.cat([gram.matmul(own) for gram, own in zip(self.grams, blocks, strict=True)])

    def energy(self) -> Tensor:
        return torch.cat([gram.energy() for gram in self.grams])

    def diagonal(self) -> Tensor:
        return torch.cat([gram.diagonal() for gram in self.grams])

    def factor(self) -> Tensor | None:
        return None  # matrices of different heights have no common one
