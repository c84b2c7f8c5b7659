"""Orthonormal columns: Householder's QR for one matrix, Cholesky's for batches of them on a GPU.

Householder's reflections are a chain of small kernels for each matrix. The Cholesky factor of XᵀX gives the
same Q by three large products for a whole batch, and the host waits for nothing.
"""

import torch
from torch import Tensor

from rsotrain.instruments.devices import device_kind

# Norms after a pass below which a column has no part outside those before it but rounding errors. After the
# first these are as small as what float32 resolves; after the second all other columns have norms of about 1.
_DEPENDENT = (1e-2, 0.99)
_GOLDEN = (5**0.5 - 1) / 2


def orthonormalised(block: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, which makes it continuous in ``block``.

    ``block``: k×r, or n×k×r, which is decomposed by ``cholesky_qr``, as is one on a GPU. Q is orthonormal
    for every finite ``block``, whatever its rank.
    """
    if takes_householder(block):
        q, r = torch.linalg.qr(block)
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return cholesky_qr(block)


def takes_householder(block: Tensor) -> bool:
    """Is ``block`` one matrix on a CPU, where Householder's reflections are the faster ones?"""
    return block.dim() == 2 and device_kind(block.device) == "cpu"


def cholesky_qr(block: Tensor) -> Tensor:
    """Q of the QR decomposition of ``block`` (…×k×r) with a positive diagonal of R, from Cholesky factors.

    Q ← X R⁻¹ with RᵀR = XᵀX + shift·I, three times: CholeskyQR2 (Yamamoto et al., 2015) after a shifted pass
    (Fukaya et al., 2020). In float64 with columns of norm 1 it resolves all that float32 does, condition
    numbers of 10⁷ included. After the first two passes columns that depend on those before them, or that are
    zero or not finite, are replaced by fixed ones. At full rank these can lie close to the others, so a
    fourth pass follows where 2r > k.
    """
    return cholesky_qr_(block.to(torch.float64, copy=True)).to(block.dtype)


def cholesky_qr_(q: Tensor) -> Tensor:
    """``cholesky_qr`` of ``q`` (float64) in its own memory, beside which are at most the fixed columns."""
    size, rank = q.shape[-2:]
    norms = torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    q.div_(norms).nan_to_num_(nan=0.0)  # 0 / 0, ∞ / ∞ and what is NaN; finite numbers over ∞ are 0
    others = _waves(size, rank, q.device)
    for dependent in _DEPENDENT:
        _cholesky_pass_(q)
        norms = torch.linalg.vector_norm(q, dim=-2, keepdim=True)
        torch.where(norms > dependent, q.div_(norms), others, out=q)
    for _ in range(2 if 2 * rank > size else 1):
        _cholesky_pass_(q)
    return q


def _cholesky_pass_(columns: Tensor) -> None:
    """X ← X R⁻¹; ``columns``: X, of norms up to 1."""
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).add_(4 * columns.shape[-1] * torch.finfo(gram.dtype).eps)
    # without a check of errors, for which the host would wait
    upper = torch.linalg.cholesky_ex(gram, check_errors=False).L.mT
    torch.linalg.solve_triangular(upper, columns, upper=True, left=False, out=columns)


def _waves(size: int, rank: int, device: torch.device) -> Tensor:
    """k×r: cosines whose frequencies, jφ modulo 1, keep distances of 1/r, so that they are independent."""
    places = torch.arange(size, dtype=torch.float64, device=device)[:, None] + 0.5
    frequencies = torch.arange(1, rank + 1, dtype=torch.float64, device=device).mul_(_GOLDEN).remainder_(1.0)
    return (places * frequencies).mul_(torch.pi).cos_().mul_((2.0 / size) ** 0.5)
