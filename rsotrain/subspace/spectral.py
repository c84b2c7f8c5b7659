"""Bases of a gradient's dominant directions: from its Gram matrix's spectrum, products or diagonal."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rsotrain.config.methods import (
    GoLoreConfig,
    ImportanceConfig,
    MixtureConfig,
    RandomizedSvdConfig,
    SvdConfig,
    SvdSolver,
    TopkNormConfig,
)
from rsotrain.subspace.gram import Gram
from rsotrain.subspace.random_bases import haar, normal
from rsotrain.subspace.samplers import Columns, Sampler, SampleRequest, one_hot, orthonormalised


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


def svd(request: SampleRequest) -> Tensor:
    """The r dominant singular vectors (GaLore, arXiv 2403.03507), from the smaller side's Gram matrix."""
    assert request.gram is not None
    _, vectors = eigenbasis(request.gram, lambda values: bool(values[request.rank - 1] > 0))
    return align_signs(vectors[:, : request.rank].float(), request.previous)


def full_svd(request: SampleRequest) -> Tensor:
    """The same from ``torch.linalg.svd`` of the gradient in float32, signs as LAPACK leaves them.

    LAPACK's signs differ between a matrix and its transpose, so the gradient is decomposed as it lies in
    memory: with the signs, kept moments are those of GaLore's code.
    """
    assert request.gram is not None
    factor = request.gram.factor()
    assert factor is not None, "only a gradient has a full SVD"
    if factor.stride(0) < factor.stride(1):
        return torch.linalg.svd(factor.T.float(), full_matrices=False)[0][:, : request.rank]
    return torch.linalg.svd(factor.float(), full_matrices=False)[2][: request.rank].T


def importance(request: SampleRequest, power: float) -> Tensor:
    """r distinct singular vectors, drawn one after another with weights σ^power (I3S, arXiv 2502.05790).

    Indices ascend, so that kept moments loosely match; columns are orthonormal, no importance weights.
    Vectors of σ = 0 come only when there are no others.
    """
    assert request.gram is not None

    def resolved(values: Tensor) -> bool:
        # singular values that were cut to 0 lay below √noise·σ₁: may they hold 1 % of the weight?
        bound = int((values == 0).sum()) * _noise(torch.float32, request.size) ** (power / 2)
        shares = (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)) ** (power / 2)
        return values.dtype is torch.float64 or bound <= 0.01 * float(shares.sum())

    values, vectors = eigenbasis(request.gram, resolved)
    # the r largest of log w + Gumbel noise are a draw without replacement
    uniform = torch.rand(request.size, generator=request.generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    keys = 0.5 * power * values.double().log().to(gumbel.device) + gumbel
    picked = keys.argsort(descending=True, stable=True)[: request.rank].sort().values
    return align_signs(vectors[:, picked.to(vectors.device)].float(), request.previous)


def randomized_svd(request: SampleRequest, rounds: int) -> Tensor:
    """Block power iteration Q ← orth(AᵀA Q), ``rounds`` of it from the basis in use.

    The first draw starts from a random basis and takes two rounds more. Columns that the gradient has
    left, where AᵀA Q is rounding noise, start from random ones: they would never find it again.
    """
    assert request.gram is not None
    block = haar(request) if request.previous is None else request.previous.float()
    rounds = rounds + 2 if request.previous is None else rounds
    multiply: Callable[[Tensor], Tensor] = request.gram.matmul
    if 4 * rounds * request.rank > 1.25 * request.size:  # 4Mkr operations a round, where AᵀA once is 1.1Mk²
        multiply = request.gram.matrix(torch.float32).matmul
    for i in range(rounds):
        product = multiply(block)
        if i == 0:
            norms = torch.linalg.vector_norm(product, dim=0)
            left = norms <= 16 * torch.finfo(norms.dtype).eps * request.gram.energy().to(norms.dtype)
            if bool(left.any()):
                product = torch.where(left, multiply(haar(request)), product)
        block = orthonormalised(product)
    return block


def topk_norm(request: SampleRequest) -> Tensor:
    """The r axes with the largest column norms of A, in ascending order."""
    assert request.gram is not None
    return one_hot(request.gram.diagonal().topk(request.rank).indices.sort().values, request.size)


def num_principal(rank: int, principal_fraction: float) -> int:
    return round(principal_fraction * rank)


def mixture(request: SampleRequest, principal_fraction: float) -> Tensor:
    """``principal_fraction`` of the columns from svd, the others haar in their orthogonal complement."""
    principal = num_principal(request.rank, principal_fraction)
    if principal == 0:
        return haar(request)
    dominant = svd(replace(request, rank=principal, previous=None))
    # Gram-Schmidt leaves the dominant columns, which are orthonormal already, as they are
    basis = orthonormalised(torch.cat([dominant, normal(request)[:, principal:]], dim=1))
    return align_signs(basis, request.previous)


def golore(request: SampleRequest) -> Tensor:
    """svd, then haar in the last part of training (GoLore, arXiv 2410.11289)."""
    return haar(request) if request.switched else svd(request)


def svd_sampler(config: SvdConfig) -> Sampler:
    if config.solver is SvdSolver.full:
        return Sampler(config.name, full_svd, informed=True, needs_gradient=True)
    return Sampler(config.name, svd, informed=True)


def importance_sampler(config: ImportanceConfig) -> Sampler:
    return Sampler(config.name, partial(importance, power=config.power), informed=True)


def randomized_svd_sampler(config: RandomizedSvdConfig) -> Sampler:
    sample = partial(randomized_svd, rounds=config.rounds)
    return Sampler(config.name, sample, informed=True, by_products=True)


def topk_norm_sampler(config: TopkNormConfig) -> Sampler:
    return Sampler(config.name, topk_norm, Columns.axes, informed=True, by_products=True)


def mixture_sampler(config: MixtureConfig) -> Sampler:
    fraction = config.principal_fraction
    return Sampler(
        config.name,
        partial(mixture, principal_fraction=fraction),
        informed=True,
        informed_columns=partial(num_principal, principal_fraction=fraction),
    )


def golore_sampler(config: GoLoreConfig) -> Sampler:
    return Sampler(config.name, golore, informed=True, switch=1.0 - config.random_fraction)
