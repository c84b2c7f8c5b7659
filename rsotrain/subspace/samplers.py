"""Samplers: functions from a SampleRequest (Gram matrix or size, rank, generator) to a basis, k×r in float32.

Random samplers (``random_bases.py``) use only ``SampleRequest.size``; data-dependent ones (``spectral.py``,
``online_pca.py``) use ``SampleRequest.gram``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from rsotrain.subspace.gram import Gram


@dataclass
class SampleRequest:
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


class Columns(Enum):
    """What is known of the columns of a sampler's bases, from the most to the least.

    axes: unit vectors, so that nothing is rounded in products with them. unit: their norms are 1, or
    nearly, but they are not orthogonal. scaled: E[QQᵀ] = I instead.
    """

    axes = "axes"
    orthonormal = "orthonormal"
    unit = "unit"
    scaled = "scaled"


@dataclass(frozen=True)
class Sampler:
    """A way to sample bases.

    ``columns``: what is known of them; ``hint`` says what to do where they must be orthonormal and are not.
    ``informed``: it needs the Gram matrix. ``needs_gradient``: and the gradient that this is of.
    ``post_update``: after the first basis, it samples after the update, for the next step. ``switch``: share
    of training after which it samples by another rule, which needs no data; there is a new basis then,
    wherever the last one was. ``by_products``: after the first basis it is content with a few products with
    the Gram matrix, so that ranks that share a matrix sample together; otherwise one does for all.
    ``state_shapes``: of the float32 tensors it keeps for a k×r basis, by name.
    ``informed_columns``: of r, how many of the first the data chooses; None: all of them if ``informed``.
    """

    name: str
    sample: Callable[[SampleRequest], Tensor]
    columns: Columns = Columns.orthonormal
    informed: bool = False
    needs_gradient: bool = False
    post_update: bool = False
    by_products: bool = False
    switch: float | None = None
    hint: str = ""
    state_shapes: Callable[[int, int], dict[str, tuple[int, ...]]] = no_state
    informed_columns: Callable[[int], int] | None = None

    def num_informed(self, rank: int) -> int:
        """Of the columns of a basis that has seen data, those that it was chosen by, which come first."""
        if self.informed_columns is not None:
            return self.informed_columns(rank)
        return rank if self.informed else 0

    @property
    def orthonormal(self) -> bool:
        return self.columns in (Columns.axes, Columns.orthonormal)

    def state_bytes(self, size: int, rank: int) -> int:
        """Of what it keeps for a k×r basis beside the basis."""
        return sum(4 * math.prod(shape) for shape in self.state_shapes(size, rank).values())


def orthonormalised(block: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal of R, hence continuous in ``block``.

    Orthonormal for every finite block, of any rank.
    """
    q, r = torch.linalg.qr(block)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def one_hot(indices: Tensor, size: int) -> Tensor:
    """Unit vectors e_i for ``indices`` (r) as columns, k×r."""
    basis = torch.zeros(size, len(indices), device=indices.device)
    return basis.scatter_(0, indices[None, :], 1.0)
