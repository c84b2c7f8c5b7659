"""(MᵀM)^-½ of symmetric positive matrices MᵀM: from eigenvectors on a CPU, by products on a GPU."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from rsotrain.optim.stacks import in_stacks, stacked

# Singular values of M below this share of its norm are rounding errors of float32.
_NOISE = 16 * torch.finfo(torch.float32).eps


def inverse_roots(grams: Sequence[Tensor]) -> list[Tensor]:
    """(MᵀM)^-½ (r×r, float64) for each MᵀM; 0 in the directions where M is only rounding errors.

    On a GPU, where all have one size, it is small in these directions (``inverse_roots_by_products``), and
    ``grams`` may be overwritten.
    """
    if in_stacks(grams[0].device):
        return list(inverse_roots_by_products(stacked(grams)).unbind())
    result: dict[int, Tensor] = {}
    for size in {len(gram) for gram in grams}:
        chosen = [i for i, gram in enumerate(grams) if len(gram) == size]
        result |= dict(zip(chosen, _by_eigenvectors(torch.stack([grams[i] for i in chosen])), strict=True))
    return [result[i] for i in range(len(grams))]


def _by_eigenvectors(grams: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(grams)
    kept = values > _NOISE**2 * values[:, -1:].clamp(min=0)
    return (vectors * values.rsqrt().where(kept, 0.0).unsqueeze(1)) @ vectors.mT


def inverse_roots_by_products(grams: Tensor) -> Tensor:
    """``inverse_roots`` of n×r×r in float64, which are overwritten, by products alone: no wait of the host.

    X ← X·p(X²) takes singular values of ``_NOISE`` and more to 1 (Polar Express: Amsel et al., 2025, arXiv
    2505.16932). As all factors are polynomials of MᵀM they need only this matrix. Smaller singular values
    are multiplied by at most what takes that bound to 1, so that M(MᵀM)^-½ is small where M is only noise,
    and 0 where it is 0. Its error is up to about 1e-6, since the first polynomials take some large singular
    values to small ones on the way.
    """
    norms = torch.linalg.vector_norm(grams, dim=(1, 2), keepdim=True).clamp_(
        min=torch.finfo(grams.dtype).tiny
    )
    gram = grams.div_(norms)
    first, *others = polynomials()
    root = factor = _polynomial(gram, *first)
    for coefficients in others:
        for _ in range(2):  # one after the other, as each may be large
            gram = torch.bmm(gram, factor)
        factor = _polynomial(gram, *coefficients)
        root = torch.bmm(root, factor)
    return root.mul_(norms.rsqrt_())


def _polynomial(gram: Tensor, constant: float, linear: float, square: float) -> Tensor:
    """aI + bX + cX² of each X."""
    result = torch.baddbmm(gram, gram, gram, beta=linear, alpha=square)
    result.diagonal(dim1=1, dim2=2).add_(constant)
    return result


@cache
def polynomials() -> list[tuple[float, float, float]]:
    """(a, b, c) of each p(x²) = a + bx² + cx⁴; x·p(x²) one after the other take [``_NOISE``, 1] to 1.

    Each is the best for the interval that the one before leaves, [l, 2 − l], scaled to [l, 1]. The last is
    Newton-Schulz's of that order, which cubes what errors are left.
    """
    found: list[tuple[float, float, float]] = []
    low = _NOISE
    while 1.0 - low > 1e-6:
        (a, b, c), reached = _best_quintic(low)
        high = 2.0 - reached
        found.append((a / high, b / high, c / high))
        low = reached / high
    return [*found, (15 / 8, -10 / 8, 3 / 8)]


def _best_quintic(low: float) -> tuple[tuple[float, float, float], float]:
    """The coefficients of p(x) = ax + bx³ + cx⁵ with the least error |1 − p| on [``low``, 1], and 1 − error.

    By Remez's algorithm: the error has its largest size at both ends and at the two extremes between them.
    """
    inner = np.array([(3 * low + 1) / 4, (low + 3) / 4])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    while True:
        places = np.array([low, *inner, 1.0])
        equations = np.stack([places, places**3, places**5, signs], axis=1)
        a, b, c, error = map(float, np.linalg.solve(equations, np.ones(4)))
        root = math.sqrt(9 * b * b - 20 * a * c)
        extremes = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
        if np.abs(extremes - inner).max() < 1e-9:  # the next would be rounding errors
            return (a, b, c), 1.0 - error
        inner = extremes
