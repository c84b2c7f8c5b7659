"""Samplers: (Gram matrix or size, rank, generator) -> basis of k×r in float32.

The data-free ones look only at ``Draw.size``; the data-dependent ones at ``Draw.gram``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rsotrain.subspace.gram import Gram


@dataclass
class Draw:
    """One request for a basis.

    ``previous``: the basis in use (k×r), None at the first draw. ``switched``: training is past the
    sampler's ``switch``. ``lr_factor``: of the schedule, 1 at the peak. ``state``: the sampler's own
    tensors for this matrix, updated in place.
    """

    size: int
    rank: int
    gram: Gram | None
    generator: torch.Generator
    device: torch.device
    previous: Tensor | None = None
    switched: bool = False
    lr_factor: float = 1.0
    state: dict[str, Tensor] = field(default_factory=dict)


def no_state(size: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {}


@dataclass(frozen=True)
class Sampler:
    """A way to draw bases.

    ``orthonormal``: the columns are orthonormal; ``hint`` says what to do where they must be and are
    not. ``unit_columns``: they are of norm 1, if only about so; else E[QQᵀ] = I. ``axes``: they are unit
    vectors, so that nothing is rounded in products with them. ``informed``: it needs the Gram matrix.
    ``lagged``: after the first draw, it draws after the update, for the next step.
    ``switch``: share of training after which it draws by another rule, which needs no data; there is a
    draw then, wherever the last one was. ``by_products``: after the first draw it is content with a few
    products with the Gram matrix, so that ranks that share a matrix draw together; otherwise one draws for
    all. ``state_shapes``: of the float32 tensors it keeps for a k×r basis, by name.
    """

    name: str
    draw: Callable[[Draw], Tensor]
    orthonormal: bool = True
    unit_columns: bool = True
    axes: bool = False
    informed: bool = False
    lagged: bool = False
    by_products: bool = False
    switch: float | None = None
    hint: str = ""
    state_shapes: Callable[[int, int], dict[str, tuple[int, ...]]] = no_state


# --- from the spectrum of the Gram matrix --------------------------------------------------------


def _noise(dtype: torch.dtype, size: int) -> float:
    """Eigenvalues of a k×k Gram matrix below this share of the largest are rounding noise."""
    return 4.0 * size**0.5 * torch.finfo(dtype).eps


def eigenbasis(gram: Gram, resolved: Callable[[Tensor], bool]) -> tuple[Tensor, Tensor]:
    """(eigenvalues λ, descending and ≥ 0; eigenvectors, k×k) of AᵀA, scaled to λ ≤ 1 or so.

    The Gram matrix squares A's condition: singular values below √noise·σ₁ are lost. So float32 is tried
    first, float64 if ``resolved(λ)`` (noise already set to 0) says that this lost too much, and the
    SVD of A in float64 if that still does, unless what float64 lost is no more than A's own rounding.
    An eigh that does not converge is passed over in the same way. Always orthonormal: it is eigh's, or
    the SVD's. Raises LinAlgError if none converges.
    """
    found = None
    for dtype in (torch.float32, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(gram.matrix(dtype))
        except torch.linalg.LinAlgError:
            continue
        values, vectors = values.flip(0), vectors.flip(1)
        clean = values.where(values > _noise(dtype, gram.size) * values[0].clamp(min=0), 0.0)
        found = clean, vectors
        if resolved(clean):
            return found
    factor = gram.factor()
    if found is None:
        if factor is None:
            # symmetric and positive: its singular vectors are its eigenvectors
            vectors, values, _ = torch.linalg.svd(gram.matrix(torch.float64))
            return values, vectors
    elif factor is None or _is_rounding(gram, factor @ found[1][:, found[0] == 0], factor):
        return found
    _, singular, vectors_h = torch.linalg.svd(factor, full_matrices=factor.shape[0] < factor.shape[1])
    values = torch.zeros(gram.size, dtype=singular.dtype, device=singular.device)
    values[: len(singular)] = singular.square()
    return values, vectors_h.T


def _is_rounding(gram: Gram, part: Tensor, factor: Tensor) -> bool:
    ratio = torch.linalg.vector_norm(part) / torch.linalg.vector_norm(factor)
    return bool(ratio <= 16 * gram.resolution)


def align_signs(basis: Tensor, previous: Tensor | None) -> Tensor:
    """Flip columns to point the way of the columns of ``previous``, for moments that are kept."""
    if previous is None:
        return basis
    cosines = (basis * previous.to(basis.dtype)).sum(0)
    return basis * torch.where(cosines < 0, -1.0, 1.0).to(basis.dtype)


def svd(draw: Draw) -> Tensor:
    """The r dominant singular vectors (GaLore, arXiv 2403.03507), from the smaller side's Gram matrix."""
    assert draw.gram is not None
    _, vectors = eigenbasis(draw.gram, lambda values: bool(values[draw.rank - 1] > 0))
    return align_signs(vectors[:, : draw.rank].float(), draw.previous)


def full_svd(draw: Draw) -> Tensor:
    """The same from ``torch.linalg.svd`` of the gradient in float32, signs as LAPACK leaves them.

    LAPACK's signs differ between a matrix and its transpose, so the gradient is decomposed as it lies in
    memory: with the signs, kept moments are those of GaLore's code.
    """
    assert draw.gram is not None
    factor = draw.gram.factor()
    assert factor is not None, "only a gradient has a full SVD"
    if factor.stride(0) < factor.stride(1):
        return torch.linalg.svd(factor.T.float(), full_matrices=False)[0][:, : draw.rank]
    return torch.linalg.svd(factor.float(), full_matrices=False)[2][: draw.rank].T


def importance(draw: Draw, power: float) -> Tensor:
    """r distinct singular vectors, drawn one after another with weights σ^power (I3S, arXiv 2502.05790).

    Indices ascend, so that kept moments loosely match; columns are orthonormal, no importance weights.
    Vectors of σ = 0 come only when there are no others.
    """
    assert draw.gram is not None

    def resolved(values: Tensor) -> bool:
        # singular values that were cut to 0 lay below √noise·σ₁: may they hold 1 % of the weight?
        bound = int((values == 0).sum()) * _noise(torch.float32, draw.size) ** (power / 2)
        shares = (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)) ** (power / 2)
        return values.dtype is torch.float64 or bound <= 0.01 * float(shares.sum())

    values, vectors = eigenbasis(draw.gram, resolved)
    # the r largest of log w + Gumbel noise are a draw without replacement
    uniform = torch.rand(draw.size, generator=draw.generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    keys = 0.5 * power * values.double().log().to(gumbel.device) + gumbel
    picked = keys.argsort(descending=True, stable=True)[: draw.rank].sort().values
    return align_signs(vectors[:, picked.to(vectors.device)].float(), draw.previous)


# --- from products with the Gram matrix, or its diagonal ---------------------------------------------


def orthonormalised(block: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, hence continuous in ``block``.

    Orthonormal for every finite block, of any rank.
    """
    q, r = torch.linalg.qr(block)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def randomized_svd(draw: Draw, rounds: int) -> Tensor:
    """Block power iteration Q ← orth(AᵀA Q), ``rounds`` of it from the basis in use.

    The first draw starts from a random basis and takes two rounds more. Columns that the gradient has
    left, where AᵀA Q is rounding noise, start from random ones: they would never find it again.
    """
    assert draw.gram is not None
    block = haar(draw) if draw.previous is None else draw.previous.float()
    rounds = rounds + 2 if draw.previous is None else rounds
    multiply: Callable[[Tensor], Tensor] = draw.gram.matmul
    if 4 * rounds * draw.rank > 1.25 * draw.size:  # 4Mkr operations a round, where AᵀA once is 1.1Mk²
        multiply = draw.gram.matrix(torch.float32).matmul
    for i in range(rounds):
        product = multiply(block)
        if i == 0:
            norms = torch.linalg.vector_norm(product, dim=0)
            left = norms <= 16 * torch.finfo(norms.dtype).eps * draw.gram.energy().to(norms.dtype)
            if bool(left.any()):
                product = torch.where(left, multiply(haar(draw)), product)
        block = orthonormalised(product)
    return block


def topk_norm(draw: Draw) -> Tensor:
    """The r axes with the largest column norms of A, in ascending order."""
    assert draw.gram is not None
    return one_hot(draw.gram.diagonal().topk(draw.rank).indices.sort().values, draw.size)


# --- at random ---------------------------------------------------------------------------------


def one_hot(indices: Tensor, size: int) -> Tensor:
    """Unit vectors e_i for ``indices`` (r) as columns, k×r."""
    basis = torch.zeros(size, len(indices), device=indices.device)
    return basis.scatter_(0, indices[None, :], 1.0)


def normal(draw: Draw) -> Tensor:
    return torch.randn(draw.size, draw.rank, generator=draw.generator).to(draw.device)


def haar(draw: Draw) -> Tensor:
    """Uniformly distributed orthonormal columns."""
    return orthonormalised(normal(draw))


def gaussian(draw: Draw) -> Tensor:
    """Independent N(0, 1/r) entries: E[PPᵀ] = I, but not orthonormal; column norms are about √(k/r)."""
    return normal(draw) * draw.rank**-0.5


def coordinate(draw: Draw) -> Tensor:
    """r distinct random axes, in ascending order."""
    picked = torch.randperm(draw.size, generator=draw.generator)[: draw.rank].sort().values
    return one_hot(picked.to(draw.device), draw.size)


def srht(draw: Draw) -> Tensor:
    """r random columns of D (H ⊗ C): random signs, Hadamard for the power of two in k, cosines for the rest.

    The usual padding to a power of two is not orthonormal for other k; this is, for every k.
    """
    odd = draw.size
    while odd % 2 == 0:
        odd //= 2
    two = draw.size // odd
    signs = torch.randint(0, 2, (draw.size, 1), generator=draw.generator) * 2.0 - 1.0
    columns = torch.randperm(draw.size, generator=draw.generator)[: draw.rank].sort().values
    # H[i, j] = (−1)^popcount(i & j) / √two
    parity = torch.arange(two)[:, None] & (columns // odd)[None, :]
    for shift in (32, 16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    hadamard = (1.0 - 2.0 * (parity & 1)) / two**0.5
    # C[i, j] = √(2/odd) cos(π (i + ½) j / odd), and 1/√odd for j = 0
    j = (columns % odd).double()
    cosines = torch.cos(torch.pi * (torch.arange(odd).double()[:, None] + 0.5) * j / odd)
    cosines *= torch.where(j == 0, 1.0, 2.0**0.5) / odd**0.5
    product = hadamard[:, None, :] * cosines[None, :, :]
    return (product.reshape(draw.size, -1) * signs).float().to(draw.device)


def mixture(draw: Draw, principal_fraction: float) -> Tensor:
    """``principal_fraction`` of the columns from svd, the others haar in their orthogonal complement."""
    principal = round(principal_fraction * draw.rank)
    if principal == 0:
        return haar(draw)
    dominant = svd(replace(draw, rank=principal, previous=None))
    # Gram-Schmidt leaves the dominant columns, which are orthonormal already, as they are
    basis = orthonormalised(torch.cat([dominant, normal(draw)[:, principal:]], dim=1))
    return align_signs(basis, draw.previous)


def golore(draw: Draw) -> Tensor:
    """svd, then haar in the last part of training (GoLore, arXiv 2410.11289)."""
    return haar(draw) if draw.switched else svd(draw)
