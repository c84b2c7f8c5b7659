"""Bases that depend on no data."""

import torch
from torch import Tensor

from rsotrain.config.methods import CoordinateConfig, GaussianConfig, HaarConfig, SRHTConfig
from rsotrain.subspace.samplers import Columns, Draw, Sampler, one_hot, orthonormalised


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


def haar_sampler(config: HaarConfig) -> Sampler:
    return Sampler(config.name, haar)


def gaussian_sampler(config: GaussianConfig) -> Sampler:
    hint = "use sampler=haar, which is its orthonormal form"
    return Sampler(config.name, gaussian, Columns.scaled, hint=hint)


def coordinate_sampler(config: CoordinateConfig) -> Sampler:
    return Sampler(config.name, coordinate, Columns.axes)


def srht_sampler(config: SRHTConfig) -> Sampler:
    return Sampler(config.name, srht)
