"""Moments: computed in float32, stored in the dtype that the run asks for. All methods use them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsotrain.optim.rounding import stochastic_round_
from rsotrain.subspace.seeding import generator

_VECTOR_ELEMENTS = 64


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which moments are computed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Moment:
    """One moment of one parameter, as this rank stores it.

    ``key``: its name in the optimizer state. ``label``: seeds the stochastic rounding. It differs between the
    pieces of a sharded moment; a replicated moment has one label, and so the same values, on all ranks.
    ``dim``: the dimension in which the moment is sharded as its parameter is; None: it is not sharded.
    """

    key: str
    label: str
    values: Tensor
    dim: int | None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds, by name."""
        return {self.key: self.values}

    def zero_(self) -> None:
        self.values.zero_()

    def rows(self, limit: int) -> "list[Moment]":
        """Split into runs of whole rows (of entries, for a vector) with about ``limit`` elements each.

        The size of all runs but the last is a multiple of a CPU's vector length, so that kernels round the
        runs as they round the whole tensor.
        """
        if self.values.ndim == 0:
            return [self]
        row = max(1, self.values[:1].numel())
        unit = _VECTOR_ELEMENTS // math.gcd(row, _VECTOR_ELEMENTS)
        step = max(1, limit // row // unit) * unit
        return [
            Moment(self.key, f"{self.label}:{i}", run, self.dim)
            for i, run in enumerate(self.values.split(step))
        ]


class StateKeeper:
    """Stores moments in float32 or bfloat16. They are computed in float32 (float64 for float64 weights).

    bfloat16 moments are rounded stochastically, with a generator seeded by (run seed, label, step).
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.seed = seed

    def moment(
        self, key: str, shape: Sequence[int], like: Tensor, *, label: str, dim: int | None = None
    ) -> Moment:
        """A moment of zeros of ``shape`` (this rank's piece), for the dtype and on the device of ``like``."""
        dtype = self.dtype if self.dtype is torch.bfloat16 else work_dtype(like.dtype)
        return Moment(key, label, torch.zeros(tuple(shape), dtype=dtype, device=like.device), dim)

    def read(self, moments: Sequence[Moment]) -> list[Tensor]:
        """The values in at least float32: the stored tensors if they are, else copies."""
        return [m.values.to(work_dtype(m.values.dtype)) for m in moments]

    def write(self, moments: Sequence[Moment], values: Sequence[Tensor], step: int, reason: str = "") -> None:
        """Store values that ``read`` returned and that were changed in place.

        ``reason``: names a second write in one step, so that it is rounded with other random numbers.
        """
        for moment, value in zip(moments, values, strict=True):
            if value is not moment.values:
                label = f"{moment.label}.{reason}" if reason else moment.label
                random = generator(self.seed, "rounding", label, step, device=value.device)
                stochastic_round_(moment.values, value, random)
