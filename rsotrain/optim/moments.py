"""Moments: computed wide, kept as small as the run asks for. The only way to a moment, for every method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsotrain.optim.rounding import stochastic_round_
from rsotrain.subspace.seeding import generator

_VECTOR_ELEMENTS = 64


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that moments are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Moment:
    """One moment of one parameter, as it is kept on this rank.

    ``key``: its name in the optimizer state. ``label``: seeds its rounding, and tells a rank's piece from the
    others; what is whole on every rank has the same label on all, and so the same values. ``dim``: the
    dimension in which the parameter's shards divide it; None: whole.
    """

    key: str
    label: str
    values: Tensor
    dim: int | None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds of it, by name."""
        return {self.key: self.values}

    def zero_(self) -> None:
        self.values.zero_()

    def rows(self, limit: int) -> "list[Moment]":
        """Runs of whole rows (entries, if it is a vector) with about ``limit`` elements.

        All but the last fill the vectors of any CPU, so that its kernels round as they do the whole.
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
    """Moments kept in float32 or bfloat16 and always computed in float32 (float64 for float64 weights).

    bfloat16 moments are rounded stochastically, from a generator seeded by (run seed, label, step).
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.seed = seed

    def moment(
        self, key: str, shape: Sequence[int], like: Tensor, *, label: str, dim: int | None = None
    ) -> Moment:
        """Zeros of ``shape``, this rank's piece, on the device of ``like`` and for its dtype."""
        dtype = self.dtype if self.dtype is torch.bfloat16 else work_dtype(like.dtype)
        return Moment(key, label, torch.zeros(tuple(shape), dtype=dtype, device=like.device), dim)

    def read(self, moments: Sequence[Moment]) -> list[Tensor]:
        """Their values, wide: the tensors themselves where these are, copies otherwise."""
        return [m.values.to(work_dtype(m.values.dtype)) for m in moments]

    def write(self, moments: Sequence[Moment], values: Sequence[Tensor], step: int, reason: str = "") -> None:
        """Keep what ``read`` gave, after it was changed in place.

        ``reason``: tells a second writing in one step from the first, so that it is rounded by other numbers.
        """
        for moment, value in zip(moments, values, strict=True):
            if value is not moment.values:
                label = f"{moment.label}.{reason}" if reason else moment.label
                random = generator(self.seed, "rounding", label, step, device=value.device)
                stochastic_round_(moment.values, value, random)
