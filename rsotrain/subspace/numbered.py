"""Bases of columns of one fixed matrix, the cosine transform: the numbers of the columns are enough."""

import torch
from torch import Tensor


def cosine_columns(numbers: Tensor, size: int) -> Tensor:
    """The columns D_j, j of ``numbers`` (…×r), of the orthonormal cosine transform (DCT-II) of a size: …×k×r.

    Column j is √(2/k)·cos(π(i + ½)j/k), in float32; for a negative number it is 0.
    """
    i, j = torch.arange(size, dtype=torch.float64, device=numbers.device)[:, None], numbers.unsqueeze(-2)
    columns = torch.cos(torch.pi / size * (i + 0.5) * j.double()) * (2 / size) ** 0.5
    return columns.masked_fill_(j == 0, size**-0.5).masked_fill_(j < 0, 0.0).float()


def cosine_basis(size: int, device: torch.device) -> Tensor:
    """All k columns of the transform."""
    return cosine_columns(torch.arange(size, device=device), size)


def numbers_of(bases: Tensor) -> Tensor:
    """The numbers (…×r) of columns of the transform, in any dtype (…×k×r); −1 for columns of zeros."""
    overlaps = cosine_basis(bases.shape[-2], bases.device).T @ bases.float()
    return overlaps.argmax(-2).masked_fill_(~bases.any(-2), -1)


def number_dtype(size: int) -> torch.dtype:
    return torch.int16 if size < 1 << 15 else torch.int32
