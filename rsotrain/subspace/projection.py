"""Projections, and the one place that distinguishes left from right projections.

A weight W (m×n) is projected on its smaller side (GaLore, arXiv 2403.03507): ``right`` if m ≥ n, with a
basis Q of n×r and R = G Q; else ``left``, with a basis of m×r and R = Qᵀ G. All other code uses the
*oriented* view A = G (right) or Gᵀ (left), M×k with M ≥ k. In both cases R = A Q (M×r) and lift(R) = R Qᵀ, so
moments have one row for each row or column that is not projected.
"""

from enum import Enum

import torch
from torch import Tensor

from rsotrain.errors import UserError


class Side(Enum):
    left = "left"
    right = "right"


def side_of(shape: torch.Size | tuple[int, int]) -> Side:
    """The projected side of a whole weight of this shape; right for a square one."""
    rows, columns = shape
    return Side.right if rows >= columns else Side.left


def oriented(matrix: Tensor, side: Side) -> Tensor:
    """View of a matrix, or of each of a stack, with the projected dimension last, to read and to write."""
    return matrix if side is Side.right else matrix.mT


def resolve_rank(rank: int | float, size: int, name: str) -> int:
    """Rank in the projected dimension ``size`` of the parameter ``name``.

    An int is the rank itself, a float a fraction of ``size``. Raises UserError if it does not fit.
    """
    if isinstance(rank, float):
        if not 0.0 < rank <= 1.0:
            raise UserError(
                f"optimizer.rank={rank} must lie in (0, 1] as a fraction; write a whole number for a rank"
            )
        return max(1, round(rank * size))
    if rank < 1:
        raise UserError(f"optimizer.rank={rank} must be at least 1")
    if rank > size:
        raise UserError(
            f"optimizer.rank={rank} is larger than the projected dimension ({size}) of {name};"
            " give a smaller rank, or a fraction such as optimizer.rank=0.25"
        )
    return rank


def project_(out: Tensor, matrix: Tensor, basis: Tensor) -> None:
    """out ← A Q. ``out``: M×r, any float dtype; ``matrix``: A, M×k. The product runs in the basis' dtype."""
    if out.dtype == matrix.dtype == basis.dtype:
        torch.mm(matrix, basis, out=out)
    else:
        out.copy_(matrix.to(basis.dtype) @ basis)


def add_lifted_(
    target: Tensor, low_rank: Tensor, basis: Tensor, alpha: float, decay_factor: float = 1.0
) -> None:
    """target ← decay_factor · target + alpha · low_rank Qᵀ, in place, rounded once to a bfloat16 target.

    ``target``: M×k; ``low_rank``: M×r; ``basis``: k×r, whose dtype the product runs in. Where all three
    have one dtype, no M×k temporary is made.
    """
    factor = low_rank.to(basis.dtype)
    # products have the memory layout of the target, which is a transposed view if it is left-projected
    if target.dtype == basis.dtype:
        if target.is_contiguous():
            target.addmm_(factor, basis.T, beta=decay_factor, alpha=alpha)
        else:
            target.T.addmm_(basis, factor.T, beta=decay_factor, alpha=alpha)
        return
    lifted = factor @ basis.T if target.is_contiguous() else (basis @ factor.T).T
    if decay_factor != 1.0 and torch.promote_types(target.dtype, lifted.dtype) is lifted.dtype:
        target.add_(lifted.mul_(alpha).add_(target, alpha=decay_factor - 1.0))
        return
    if decay_factor != 1.0:
        target.mul_(decay_factor)
    target.add_(lifted, alpha=alpha)
