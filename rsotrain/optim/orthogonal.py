"""Rows made orthonormal in groups, by Newton-Schulz iterations on all groups of a size at once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rsotrain.optim.functional import row_norms
from rsotrain.optim.stacks import product_in

# of Muon's polynomial: singular values of 0.02 and more end between 0.7 and 1.2 after five iterations
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def rows_of_group(group: int | float, size: int) -> int:
    """The rows of a group: a number, or with a point a fraction of k = ``size``; at least 1 and at most k."""
    rows = round(group * size) if isinstance(group, float) else group
    return min(max(1, rows), size)


def newton_schulz(stack: Tensor, iterations: int) -> Tensor:
    """About (XXᵀ)^-½ X of each X (b×k, b ≤ k) of ``stack`` (g×b×k); 0 stays 0. In the dtype of ``stack``.

    X ← aX + (bXXᵀ + c(XXᵀ)²)X from X/‖X‖ (Jordan et al., Muon).
    """
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True)
    return newton_schulz_of_small(stack / norms.clamp(min=torch.finfo(stack.dtype).tiny), iterations)


def newton_schulz_of_small(x: Tensor, iterations: int) -> Tensor:
    """The same of X (g×b×k) with ‖X‖_F ≤ 1, or about 1."""
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonal_groups_of_stack(
    stack: Tensor, noise: Tensor, one: Tensor, rows: int, iterations: int
) -> Tensor:
    """``orthogonal_groups`` of n matrices of one shape, n×M×k, whose rows count as 0 where they are noise.

    ``noise``: the largest norms of such rows, n×M×1 in float32 (or float64); ``one``: 1×1×1, alike. The norms
    of groups are those of their rows, noise among them, so that all of it takes two passes over ``stack``.
    """
    count, size = stack.shape[1:]
    missing = -count % rows
    padded = F.pad(stack, (0, 0, 0, missing)) if missing else stack
    norms = row_norms(padded, noise.dtype)
    of_groups = norms.view(-1, 1, rows)
    # the least number beside the square makes 0 of groups of zeros
    scales = torch.baddbmm(one, of_groups, of_groups.mT, beta=torch.finfo(one.dtype).tiny).rsqrt_()
    norms[:, :count].gt_(noise)  # 1 where a row is kept
    scales = product_in(stack.dtype, norms.view(-1, rows, 1), scales)
    groups = newton_schulz_of_small(padded.reshape(-1, rows, size) * scales, iterations)
    return groups.view(padded.shape)[:, :count]


def orthogonal_groups(matrices: Sequence[Tensor], rows: Sequence[int], iterations: int) -> list[Tensor]:
    """Each matrix (M×k) with its rows made orthonormal in groups of ``rows`` neighbours.

    The last group may be smaller. Groups of one shape are treated together. New tensors in the dtype of the
    matrices.
    """
    found: list[Tensor | None] = [None] * len(matrices)
    for shape in dict.fromkeys(zip(rows, (m.shape[1] for m in matrices), strict=True)):
        chosen = [i for i, m in enumerate(matrices) if (rows[i], m.shape[1]) == shape]
        missing = [-len(matrices[i]) % shape[0] for i in chosen]
        padded = [
            F.pad(matrices[i], (0, 0, 0, n)) if n else matrices[i]
            for i, n in zip(chosen, missing, strict=True)
        ]
        whole = newton_schulz(torch.cat(padded).view(-1, *shape), iterations).flatten(0, 1)
        parts = whole.split([len(p) for p in padded])
        for i, part in zip(chosen, parts, strict=True):
            found[i] = part[: len(matrices[i])]
    return [matrix for matrix in found if matrix is not None]
