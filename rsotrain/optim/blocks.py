"""Moments in 8 bits: one code an element, one float32 scale a block of at most 256 elements.

A value x is stored as a root of itself, in equal steps up to the root of the block's largest value:

- signed, for first moments: x = w|w| with w = c·s, c in −127 … 127, rounded to nearest;
- unsigned, for second moments: x = w⁴ with w = c·s, c in 0 … 255, rounded stochastically.

The steps of a root grow with the value, so that coordinates of a block may lie far apart, as the columns of
a projected gradient do. A second moment moves by 1 − β₂ = 0.001 of itself in a step, which is less than half
the distance to the next code: rounded to nearest it would stay where the first steps left it, and rounded at
random it follows on average. A first moment moves by a tenth and is rounded to nearest, with half the error.
Nothing but zero is stored as a second moment of zero, which would make the update m/ε.

Blocks lie along the dimension that is not sharded, so that any number of ranks has the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsotrain.parallel.sharding import preferred_dim

BLOCK = 256
SMALLEST_BLOCK = 8
_SIGNED, _UNSIGNED = 127, 255


def is_unsigned(key: str) -> bool:
    """Is this a moment that is never negative? The names of second moments end in ``_sq``."""
    return key.endswith("_sq")


def block_dim(whole: Sequence[int], parameter: Sequence[int], *, rows: bool) -> int:
    """The dimension along which blocks of a moment lie. ``whole``: its shape, on all ranks together.

    ``rows``: is the parameter sharded by its rows in any case? Moments of the parameter's shape are sharded
    like it, all others by their rows.
    """
    if tuple(whole) != tuple(parameter):
        return 1
    return 1 - preferred_dim(tuple(whole), 2, rows=rows)


def block_size(shape: Sequence[int], dim: int) -> int | None:
    """The largest divisor of ``shape[dim]`` that is at most 256.

    None for what stays in float32: vectors, and matrices whose blocks would have fewer than 8 elements.
    """
    if len(shape) != 2 or shape[dim] == 0:
        return None
    size = next(n for n in range(min(BLOCK, shape[dim]), 0, -1) if shape[dim] % n == 0)
    return size if size >= SMALLEST_BLOCK else None


def scales_shape(shape: Sequence[int], dim: int, block: int) -> tuple[int, int]:
    rows, columns = shape
    return (rows // block, columns) if dim == 0 else (rows, columns // block)


def by_blocks(values: Tensor, dim: int, block: int) -> Tensor:
    """A view (A, block, C) of contiguous ``values`` (a matrix), whose second dimension is that of a block."""
    rows, columns = values.shape
    if dim == 0:
        return values.view(rows // block, block, columns)
    return values.view(rows * (columns // block), block, 1)


def decode(codes: Tensor, scales: Tensor, *, unsigned: bool) -> Tensor:
    """The values, float32. ``codes``: (A, block, C) int8, or uint8 if ``unsigned``; ``scales``: (A, 1, C)."""
    roots = codes.to(torch.float32).mul_(scales)
    return roots.square_().square_() if unsigned else roots.mul_(roots.abs())


def encode_signed_(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of ``values`` (A, block, C), float32, which are overwritten."""
    roots = values.abs().sqrt_().copysign_(values)
    largest = torch.linalg.vector_norm(roots, torch.inf, dim=1, keepdim=True)
    scales = largest.div_(_SIGNED)
    return roots.div_(_not_zero(scales)).round_().to(torch.int8), scales


def encode_unsigned_(values: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """The same for values ≥ 0. ``random``: uniform int32 of the same shape, which are overwritten, too.

    The expectation of the stored value is the value, but in the lowest step: that rounds up.
    """
    largest = values.amax(dim=1, keepdim=True)
    levels = values.div_(_not_zero(largest)).mul_(float(_UNSIGNED**4))  # w⁴ in units of the smallest code's
    below = levels.sqrt().sqrt_().floor_().clamp_(max=_UNSIGNED - 1)
    lower = below.square().square_()
    gap = (below + 1.0).square_().square_().sub_(lower)
    share = random.to(torch.float32).mul_(2.0**-32).add_(0.5)  # uniform in [0, 1]
    gap.mul_(share).mul_(below.sign())  # 0 in the lowest step, for which all that is positive is above
    codes = below.add_(levels.sub_(lower) > gap)
    return codes.to(torch.uint8), largest.sqrt_().sqrt_().div_(_UNSIGNED)


def _not_zero(scales: Tensor) -> Tensor:
    return scales.clamp(min=torch.finfo(scales.dtype).tiny)
