"""Samplers: functions from a SampleRequest (Gram matrix or size, rank, generator) to a basis, k×r in float32.

Random samplers (``random_bases.py``) use only ``SampleRequest.size``; data-dependent ones (``spectral.py``,
``online_pca.py``) use ``SampleRequest.gram``. On a GPU a request is for a batch of n matrices of one size:
all tensors, the basis among them, have n as their first dimension, and the host reads no value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from rsotrain.subspace.gram import Gram
from rsotrain.subspace.seeding import counted_normals, counted_uniforms, seed_of


@dataclass
class SampleRequest:
    """The input of a sampler for one refresh of one matrix, or of a batch of them (``batched``).

    ``size``, ``rank``: k and r. ``previous``: the basis in use (k×r), None at the first refresh.
    ``switched``: training is past the sampler's ``switch``. ``lr_factor``: of the learning-rate schedule, 1
    at the peak. ``states``: the sampler's own tensors for each matrix, which it updates in place.
    ``counted``: the seed for each matrix of random numbers that are a function of their place, as a GPU draws
    them; None: ``generator`` draws them.
    """

    size: int
    rank: int
    gram: Gram | None
    generator: torch.Generator
    device: torch.device
    previous: Tensor | None = None
    switched: bool = False
    lr_factor: float = 1.0
    states: Sequence[dict[str, Tensor]] = ({},)
    counted: tuple[int, ...] | None = None
    batched: bool = False
    _drawn: int = field(default=0, init=False)  # how many times

    def normal(self) -> Tensor:
        """Independent N(0, 1) numbers, k×r in float32, others at each call."""
        self._drawn += 1
        if self.counted is not None:
            return self._of_one(counted_normals(self.size, self.rank, self._seeds(), self.device))
        return torch.randn(self.size, self.rank, generator=self.generator).to(self.device)

    def uniform(self) -> Tensor:
        """Independent uniform numbers in (0, 1) from ``counted``, k in float64, others at each call."""
        self._drawn += 1
        return self._of_one(counted_uniforms(self.size, self._seeds(), self.device))

    def _seeds(self) -> list[int]:
        assert self.counted is not None
        return [seed_of(seed, self._drawn) for seed in self.counted]

    def _of_one(self, drawn: Tensor) -> Tensor:
        return drawn if self.batched else drawn[0]

    def axes(self) -> Tensor:
        """Indices of r distinct random axes, ascending."""
        if self.counted is not None:
            order = self.uniform().argsort(dim=-1, stable=True)
        else:
            order = torch.randperm(self.size, generator=self.generator).to(self.device)
        return order[..., : self.rank].sort().values


def no_state(size: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {}


class Columns(Enum):
    """What is known of the columns of a sampler's bases, from the strongest to the weakest property.

    axes: distinct coordinate axes, so that products with them are exact. orthonormal. unit: of norm 1, or
    nearly, but not orthogonal. scaled: E[QQᵀ] = I.
    """

    axes = "axes"
    orthonormal = "orthonormal"
    unit = "unit"
    scaled = "scaled"


@dataclass(frozen=True)
class Sampler:
    """A way to sample bases.

    ``sample``: returns a basis (k×r, float32) for a request. ``columns``: a property of the bases; ``hint``
    says what to do where they must be orthonormal and are not. ``informed``: it needs the Gram matrix.
    ``needs_gradient``: it also needs the gradient itself. ``post_update``: all refreshes but the first come
    after the update and are for the next step. ``switch``: the share of training after which it samples by
    another rule that needs no data; the switch brings a refresh of all bases. ``by_products``: all refreshes
    but the first need only a few products with the Gram matrix, so the ranks that share a matrix sample
    together; otherwise one rank samples for all. ``state_shapes(k, r)``: shapes of its own float32 tensors
    for a k×r basis, by name. ``informed_columns(r)``: how many columns, the first ones, depend on data; None:
    all of them if ``informed``. ``column_scales(k, r)``: what multiplies the columns (r) of bases that are to
    have E[PPᵀ] = I; None: √(k/r) for all. ``decomposes``: each refresh takes eigenvectors of a k×k matrix.
    ``numbered``: columns are those of the cosine transform, and the optimizer state keeps their numbers.
    ``on_gpu``: the sampler that takes this one's place on a GPU; None: itself.
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
    column_scales: Callable[[int, int], Tensor] | None = None
    decomposes: bool = False
    numbered: bool = False
    on_gpu: "Sampler | None" = None

    def num_informed(self, rank: int) -> int:
        """How many columns of a data-dependent basis depend on data; they are the first ones."""
        if self.informed_columns is not None:
            return self.informed_columns(rank)
        return rank if self.informed else 0

    @property
    def orthonormal(self) -> bool:
        return self.columns in (Columns.axes, Columns.orthonormal)

    def state_bytes(self, size: int, rank: int) -> int:
        """Bytes of the sampler's own tensors for a k×r basis."""
        return sum(4 * math.prod(shape) for shape in self.state_shapes(size, rank).values())


def one_hot(indices: Tensor, size: int) -> Tensor:
    """The unit vectors e_i for ``indices`` (r) as columns, k×r with k = ``size``."""
    basis = torch.zeros(*indices.shape[:-1], size, indices.shape[-1], device=indices.device)
    return basis.scatter_(-2, indices.unsqueeze(-2), 1.0)
