"""Orthonormal bases of all eigenvectors, tracked by power iteration: those of SOAP's preconditioners.

Everything is for n matrices of one size at once, (n, k, k), and the host waits for nothing but the first
decomposition.
"""

import torch
from torch import Tensor

from rsotrain.subspace.orthonormal import cholesky_qr, orthonormalised

_TINY = 1e-30  # keeps a basis whose matrix is 0


def rounding_share(dtype: torch.dtype, size: int) -> float:
    """The share of a matrix's norm below which its eigenvalues are rounding errors of its entries."""
    return 4.0 * size**0.5 * torch.finfo(dtype).eps


def first_bases(matrices: Tensor, bases: Tensor) -> Tensor:
    """Eigenvectors of symmetric positive ``matrices``, by descending eigenvalues.

    Where eigenvalues are only rounding errors these decide nothing: fixed columns, orthogonal to the others,
    take the place of their eigenvectors, the same for any order of sums. A matrix that is 0 or not finite
    leaves ``bases``.
    """
    usable = matrices.isfinite().flatten(1).all(1) & matrices.flatten(1).any(1)
    values, vectors = torch.linalg.eigh(matrices.where(usable[:, None, None], 0.0))
    known = values > rounding_share(matrices.dtype, matrices.shape[-1]) * values[:, -1:]
    found = cholesky_qr(vectors.where(known[:, None, :], 0.0).flip(-1))
    return found.where(usable[:, None, None], bases)


def refreshed_bases(images: Tensor, bases: Tensor) -> Tensor:
    """Q ← QR(P Q + δQ), a round of power iteration; ``images``: P Q, where P is symmetric and positive.

    δ is as large as the rounding errors of P. It changes no eigenvector, and leaves columns as they are whose
    eigenvalue is smaller, as that of a matrix of few gradients may be 0.
    """
    share = rounding_share(images.dtype, images.shape[-1])
    norms = torch.linalg.vector_norm(images, dim=(1, 2), keepdim=True)  # that of P, as Q is orthonormal
    shifted = torch.addcmul(images, bases, norms.mul_(share).clamp_(min=_TINY))
    if len(shifted) == 1:
        return orthonormalised(shifted[0]).unsqueeze(0)
    return orthonormalised(shifted)
