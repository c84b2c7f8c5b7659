"""Samplers whose bases depend on no data."""

import torch
from torch import Tensor

from rsotrain.config.samplers import CoordinateConfig, GaussianConfig, HaarConfig, SRHTConfig
from rsotrain.subspace.orthonormal import cholesky_qr_, orthonormalised, takes_householder
from rsotrain.subspace.samplers import Columns, Sampler, SampleRequest, one_hot


def haar(request: SampleRequest) -> Tensor:
    """Uniformly distributed orthonormal columns."""
    numbers = request.normal()
    if takes_householder(numbers):
        return orthonormalised(numbers)
    wide = numbers.double()
    del numbers  # of a large basis, which is drawn where the memory is at its peak
    return cholesky_qr_(wide).to(torch.float32)


def gaussian(request: SampleRequest) -> Tensor:
    """Independent N(0, 1/r) entries: E[PPᵀ] = I, but not orthonormal; column norms are about √(k/r)."""
    return request.normal() * request.rank**-0.5


def coordinate(request: SampleRequest) -> Tensor:
    """r distinct random axes, in ascending order."""
    return one_hot(request.axes(), request.size)


def srht(request: SampleRequest) -> Tensor:
    """r random columns of D (H ⊗ C), where D has random signs on its diagonal.

    H is the Hadamard matrix of the largest power of two that divides k, and C a cosine transform of size
    k/two. Unlike the usual padding to a power of two, this is orthonormal for every k.
    """
    odd = request.size
    while odd % 2 == 0:
        odd //= 2
    two = request.size // odd
    if request.counted is not None:
        signs = torch.where(request.uniform() < 0.5, -1.0, 1.0).unsqueeze(-1)
    else:
        signs = torch.randint(0, 2, (request.size, 1), generator=request.generator) * 2.0 - 1.0
    columns = request.axes().unsqueeze(-2)
    device = columns.device
    # H[i, j] = (−1)^popcount(i & j) / √two
    parity = torch.arange(two, device=device)[:, None] & (columns // odd)
    for shift in (32, 16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    hadamard = (1.0 - 2.0 * (parity & 1)) / two**0.5
    # C[i, j] = √(2/odd) cos(π (i + ½) j / odd), and 1/√odd for j = 0
    j = (columns % odd).double()
    cosines = torch.cos(torch.pi * (torch.arange(odd, device=device).double()[:, None] + 0.5) * j / odd)
    cosines *= torch.where(j == 0, 1.0, 2.0**0.5) / odd**0.5
    product = hadamard.unsqueeze(-2) * cosines.unsqueeze(-3)
    return (product.flatten(-3, -2) * signs.to(device)).float()


def haar_sampler(config: HaarConfig) -> Sampler:
    return Sampler(config.name, haar)


def gaussian_sampler(config: GaussianConfig) -> Sampler:
    hint = "use sampler=haar, which is its orthonormal form"
    return Sampler(config.name, gaussian, Columns.scaled, hint=hint)


def coordinate_sampler(config: CoordinateConfig) -> Sampler:
    return Sampler(config.name, coordinate, Columns.axes)


def srht_sampler(config: SRHTConfig) -> Sampler:
    return Sampler(config.name, srht)
