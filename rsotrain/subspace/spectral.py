"""Samplers of a gradient's dominant directions, from its Gram matrix."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rsotrain.config.choices import BasisStorage
from rsotrain.config.samplers import (
    BlockPowerConfig,
    DctConfig,
    GoLoreConfig,
    ImportanceConfig,
    MixtureConfig,
    RandomizedSvdConfig,
    RowNormConfig,
    SvdConfig,
    SvdSolver,
    SwitchingConfig,
    TopkNormConfig,
)
from rsotrain.subspace.gram import Gram
from rsotrain.subspace.numbered import cosine_basis, cosine_columns
from rsotrain.subspace.orthonormal import orthonormalised
from rsotrain.subspace.random_bases import haar
from rsotrain.subspace.samplers import Columns, Sampler, SampleRequest, one_hot
from rsotrain.subspace.seeding import seed_of


def _noise(dtype: torch.dtype, size: int) -> float:
    """The share of the largest eigenvalue below which those of a k×k Gram matrix are rounding errors."""
    return 4.0 * size**0.5 * torch.finfo(dtype).eps


def eigenbasis(gram: Gram, resolved: Callable[[Tensor], bool]) -> tuple[Tensor, Tensor]:
    """(eigenvalues λ, descending and ≥ 0; orthonormal eigenvectors, k×k) of AᵀA as ``gram`` scales it.

    The Gram matrix squares the condition number of A: singular values below √noise·σ₁ are lost. float32 is
    tried first, then float64 if ``resolved(λ)`` (with noise set to 0) is False, then the SVD of A in float64,
    unless float64 lost no more than the rounding errors of A itself. A decomposition that does not converge
    is skipped in the same way. Raises LinAlgError if none converges.
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
            # the matrix is symmetric and positive, so its singular vectors are its eigenvectors
            vectors, values, _ = torch.linalg.svd(gram.matrix(torch.float64))
            return values, vectors
    elif factor is None or _is_rounding(gram, factor @ found[1][:, found[0] == 0], factor):
        return found
    _, singular, vectors_h = torch.linalg.svd(factor, full_matrices=factor.shape[0] < factor.shape[1])
    values = torch.zeros(gram.size, dtype=singular.dtype, device=singular.device)
    values[: len(singular)] = singular.square()
    return values, vectors_h.T


def _is_rounding(gram: Gram, lost: Tensor, factor: Tensor) -> bool:
    ratio = torch.linalg.vector_norm(lost) / torch.linalg.vector_norm(factor)
    return bool(ratio <= 16 * gram.resolution)


def eigenbases(gram: Gram) -> tuple[Tensor, Tensor]:
    """``eigenbasis`` of a batch, but ascending, in a dtype that needs no answer of the device to go on.

    λ: n×k; eigenvectors: n×k×k, of no meaning where ``gram`` is not usable. The host waits once, for torch
    asks whether all have converged; LinAlgError if not.
    """
    matrix = gram.matrix(gram.eigen_dtype).masked_fill(~gram.usable[:, None, None], 0.0)
    values, vectors = torch.linalg.eigh(matrix)
    largest = values[:, -1:].clamp(min=0)
    return values.where(values > _noise(values.dtype, gram.size) * largest, 0.0), vectors


def align_signs(basis: Tensor, previous: Tensor | None) -> Tensor:
    """Flip columns that point against those of ``previous``, so that kept moments still fit."""
    if previous is None:
        return basis
    cosines = (basis * previous.to(basis.dtype)).sum(-2, keepdim=True)
    return basis * torch.where(cosines < 0, -1.0, 1.0).to(basis.dtype)


def svd(request: SampleRequest) -> Tensor:
    """The r dominant singular vectors (GaLore, arXiv 2403.03507), from the smaller side's Gram matrix."""
    assert request.gram is not None
    if request.batched:
        vectors = eigenbases(request.gram)[1][..., -request.rank :].flip(-1)
    else:
        _, vectors = eigenbasis(request.gram, lambda values: bool(values[request.rank - 1] > 0))
    return align_signs(vectors[..., : request.rank].float(), request.previous)


def full_svd(request: SampleRequest) -> Tensor:
    """The r dominant singular vectors from ``torch.linalg.svd`` in float32, with the signs of LAPACK.

    With these signs kept moments are those of GaLore's code. As they differ between a matrix and its
    transpose, the gradient is decomposed in its memory layout.
    """
    assert request.gram is not None
    factor = request.gram.factor()
    assert factor is not None, "only a gradient has a full SVD"
    if request.batched:
        factor = factor.masked_fill(~request.gram.usable[:, None, None], 0.0)
    if factor.stride(-2) < factor.stride(-1):
        return torch.linalg.svd(factor.mT.float(), full_matrices=False)[0][..., : request.rank]
    return torch.linalg.svd(factor.float(), full_matrices=False)[2][..., : request.rank, :].mT


def weighted_sample(logarithms: Tensor, request: SampleRequest) -> Tensor:
    """Ascending indices of r of k items, drawn without replacement with weights exp(``logarithms``) (k)."""
    # the indices of the r largest log w + Gumbel noise are such a sample
    if request.counted is not None:
        uniform = request.uniform()
    else:
        uniform = torch.rand(request.size, generator=request.generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    keys = logarithms.to(gumbel.device) + gumbel
    return keys.argsort(dim=-1, descending=True, stable=True)[..., : request.rank].sort().values


def importance(request: SampleRequest, power: float) -> Tensor:
    """r singular vectors, sampled without replacement with weights σ^power (I3S, arXiv 2502.05790).

    Columns are ordered by descending σ, so that kept moments roughly match. They are orthonormal: there are
    no importance weights. Vectors with σ = 0 are sampled only if there are no others.
    """
    assert request.gram is not None
    if request.batched:
        values, vectors = eigenbases(request.gram)
        picked = weighted_sample(0.5 * power * values.double().log(), request).flip(-1)
        return align_signs(_columns(vectors, picked).float(), request.previous)

    def resolved(values: Tensor) -> bool:
        # singular values set to 0 were below √noise·σ₁; together they must have at most 1 % of the weight
        bound = int((values == 0).sum()) * _noise(torch.float32, request.size) ** (power / 2)
        shares = (values / values[0].clamp(min=torch.finfo(values.dtype).tiny)) ** (power / 2)
        return values.dtype is torch.float64 or bound <= 0.01 * float(shares.sum())

    values, vectors = eigenbasis(request.gram, resolved)
    picked = weighted_sample(0.5 * power * values.double().log(), request)
    return align_signs(_columns(vectors, picked.to(vectors.device)).float(), request.previous)


def _columns(matrix: Tensor, picked: Tensor) -> Tensor:
    """The columns ``picked`` (r) of ``matrix`` (k×k), of each matrix of a batch its own."""
    if picked.dim() == 1:
        return matrix[..., picked]
    return matrix.gather(-1, picked.unsqueeze(-2).expand(-1, matrix.shape[-2], -1))


def randomized_svd(request: SampleRequest, rounds: int, svd_first: bool = False) -> Tensor:
    """``rounds`` block power iterations Q ← orth(AᵀA Q), starting from the basis in use.

    The first refresh starts from a random basis and runs two more iterations, or is svd (``svd_first``).
    Columns for which AᵀA Q is only rounding errors restart from random vectors, because they cannot return to
    the gradient's row space. In a batch, where the host must not ask for them, those that ``cholesky_qr``
    takes for zero columns stand for the random ones, and come to the row space in the next iteration.
    """
    assert request.gram is not None
    if svd_first and request.previous is None:
        return svd(request)
    block = haar(request) if request.previous is None else request.previous.float()
    rounds = rounds + 2 if request.previous is None else rounds
    multiply: Callable[[Tensor], Tensor] = request.gram.matmul
    if 4 * rounds * request.rank > 1.25 * request.size:  # an iteration takes 4Mkr operations, AᵀA 1.1Mk²
        multiply = request.gram.matrix(torch.float32).matmul
    for i in range(rounds):
        product = multiply(block)
        if i == 0:
            norms = torch.linalg.vector_norm(product, dim=-2, keepdim=True)
            energy = request.gram.energy().to(norms.dtype)[..., None, None]
            left = norms <= 16 * torch.finfo(norms.dtype).eps * energy
            if request.batched:
                product = product.masked_fill_(left, 0.0)
            elif bool(left.any()):
                product = torch.where(left, multiply(haar(request)), product)
        block = orthonormalised(product)
    return block


def row_norm(request: SampleRequest, power: float) -> Tensor:
    """r axes sampled without replacement with weights ‖A e_i‖^power, ascending (Grass, arXiv 2406.17660)."""
    assert request.gram is not None
    logarithms = 0.5 * power * request.gram.diagonal().double().log()
    picked = weighted_sample(logarithms, request)
    return one_hot(picked.to(request.device), request.size)


def dct(request: SampleRequest) -> Tensor:
    """The r columns D_j of the cosine transform with the largest ‖A D_j‖, in ascending order."""
    assert request.gram is not None
    basis = cosine_basis(request.size, request.device)
    energies = (request.gram.matrix(torch.float32) @ basis).mul_(basis).sum(-2)
    return cosine_columns(energies.topk(request.rank).indices.sort().values, request.size)


def topk_norm(request: SampleRequest) -> Tensor:
    """The r axes with the largest column norms of A, in ascending order."""
    assert request.gram is not None
    return one_hot(request.gram.diagonal().topk(request.rank).indices.sort().values, request.size)


def num_principal(rank: int, principal_fraction: float) -> int:
    return round(principal_fraction * rank)


def mixture(request: SampleRequest, principal_fraction: float, rounds: int | None = None) -> Tensor:
    """svd for ``principal_fraction`` of the columns, haar in their orthogonal complement for the others.

    ``rounds``: of block power iterations from the columns in use, in place of svd.
    """
    principal = num_principal(request.rank, principal_fraction)
    if principal == 0:
        return haar(request)
    if rounds is None:
        dominant = svd(replace(request, rank=principal, previous=None))
    else:
        dominant = randomized_svd(_of_first_columns(request, principal), rounds)
    # orthonormalising leaves the first columns, which are orthonormal already, unchanged
    basis = orthonormalised(torch.cat([dominant, request.normal()[..., principal:]], dim=-1))
    return align_signs(basis, request.previous)


def _of_first_columns(request: SampleRequest, number: int) -> SampleRequest:
    """A request for these alone, whose random numbers are others."""
    previous = None if request.previous is None else request.previous[..., :number]
    counted = None if request.counted is None else tuple(seed_of(seed, 0) for seed in request.counted)
    return replace(request, rank=number, previous=previous, counted=counted)


def mixture_scales(size: int, rank: int, principal_fraction: float) -> Tensor:
    """1 for the r₁ principal columns, √((k−r₁)/r₂) for the r₂ random ones (PRAC, arXiv 2602.23111)."""
    principal = num_principal(rank, principal_fraction)
    scales = torch.ones(rank)
    scales[principal:] = ((size - principal) / max(1, rank - principal)) ** 0.5
    return scales


def switching(request: SampleRequest, leading: int) -> Tensor:
    """Leading directions of one power iteration, then random ones (Alice, arXiv 2502.07752, algorithm 2).

    U is the eigenbasis of AᵀA in the subspace orth(AᵀA Q_old). Its ``leading`` first columns stay, and random
    orthonormal vectors outside U replace the others, as many as there are. The first refresh is svd.
    """
    assert request.gram is not None
    if request.previous is None:
        return svd(request)
    block = orthonormalised(request.gram.matmul(request.previous.float()))
    within = block.mT @ request.gram.matmul(block)
    if request.batched:
        within = within.masked_fill_(~request.gram.usable[:, None, None], 0.0)
    _, rotation = torch.linalg.eigh(within)
    subspace = block @ rotation.flip(-1)
    drawn = min(request.rank - min(leading, request.rank), request.size - request.rank)
    if drawn > 0:
        # orthonormalising leaves the first columns unchanged
        more = orthonormalised(torch.cat([subspace, request.normal()[..., :drawn]], dim=-1))
        subspace = torch.cat([subspace[..., : request.rank - drawn], more[..., request.rank :]], dim=-1)
    return align_signs(subspace, request.previous)


def golore(request: SampleRequest, principal: Callable[[SampleRequest], Tensor] = svd) -> Tensor:
    """svd, but haar after the switch, in the last share of training (GoLore, arXiv 2410.11289)."""
    return haar(request) if request.switched else principal(request)


_ROUNDS = RandomizedSvdConfig.rounds
_power = partial(randomized_svd, rounds=_ROUNDS)


def _with_power(sampler: Sampler, sample: Callable[[SampleRequest], Tensor]) -> Sampler:
    """``sampler`` with ``sample``, which takes no eigenvectors, in its place on a GPU.

    Eigenvectors are chains of small kernels, which on a GPU take longer than hundreds of products.
    """
    return replace(sampler, on_gpu=replace(sampler, sample=sample, decomposes=False, by_products=True))


def svd_sampler(config: SvdConfig) -> Sampler:
    if config.solver is SvdSolver.full:
        return Sampler(config.name, full_svd, informed=True, needs_gradient=True, decomposes=True)
    sampler = Sampler(config.name, svd, informed=True, decomposes=True)
    return _with_power(sampler, _power) if config.power_on_gpu else sampler


def importance_sampler(config: ImportanceConfig) -> Sampler:
    return Sampler(config.name, partial(importance, power=config.power), informed=True, decomposes=True)


def randomized_svd_sampler(config: RandomizedSvdConfig) -> Sampler:
    sample = partial(randomized_svd, rounds=config.rounds)
    return Sampler(config.name, sample, informed=True, by_products=True)


def block_power_sampler(config: BlockPowerConfig) -> Sampler:
    sample = partial(randomized_svd, rounds=config.rounds, svd_first=config.svd_first)
    return Sampler(config.name, sample, informed=True, by_products=True)


def topk_norm_sampler(config: TopkNormConfig) -> Sampler:
    return Sampler(config.name, topk_norm, Columns.axes, informed=True, by_products=True)


def row_norm_sampler(config: RowNormConfig) -> Sampler:
    return Sampler(config.name, partial(row_norm, power=config.power), Columns.axes, informed=True)


def dct_sampler(config: DctConfig) -> Sampler:
    numbered = config.storage is BasisStorage.regenerated
    return Sampler(config.name, dct, informed=True, numbered=numbered)


def mixture_sampler(config: MixtureConfig) -> Sampler:
    fraction = config.principal_fraction
    sampler = Sampler(
        config.name,
        partial(mixture, principal_fraction=fraction),
        informed=True,
        decomposes=True,
        informed_columns=partial(num_principal, principal_fraction=fraction),
        column_scales=partial(mixture_scales, principal_fraction=fraction) if config.unbiased else None,
    )
    powered = partial(mixture, principal_fraction=fraction, rounds=_ROUNDS)
    return _with_power(sampler, powered) if config.power_on_gpu else sampler


def switching_sampler(config: SwitchingConfig) -> Sampler:
    return Sampler(
        config.name,
        partial(switching, leading=config.leading),
        informed=True,
        by_products=True,
        informed_columns=partial(min, config.leading),
    )


def golore_sampler(config: GoLoreConfig) -> Sampler:
    switch = 1.0 - config.random_fraction
    sampler = Sampler(config.name, golore, informed=True, switch=switch, decomposes=True)
    return _with_power(sampler, partial(golore, principal=_power)) if config.power_on_gpu else sampler
