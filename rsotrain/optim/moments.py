"""Moments: computed in float32, stored in the dtype that the run asks for. All methods use them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsotrain.optim.coded import CodedMoment, encode, widened
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
    ``coded``: the moment in 8 bits, if it is kept so.
    """

    key: str
    label: str
    values: Tensor
    dim: int | None
    coded: CodedMoment | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds, by name."""
        scales = {} if self.coded is None else {f"{self.key}_scale": self.coded.scales}
        return {self.key: self.values, **scales}

    def zero_(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()

    def rows(self, limit: int) -> "list[Moment]":
        """Split into runs of whole rows (of entries, for a vector) with about ``limit`` elements each.

        The size of all runs but the last is a multiple of a CPU's vector length, so that kernels round the
        runs as they round the whole tensor; and of whole blocks, where the moment has blocks.
        """
        if self.values.ndim == 0:
            return [self]
        row = max(1, self.values[:1].numel())
        unit = _VECTOR_ELEMENTS // math.gcd(row, _VECTOR_ELEMENTS)
        if self.coded is not None:
            unit = math.lcm(unit, self.coded.rows_of_block)
        step = max(1, limit // row // unit) * unit
        return [
            Moment(self.key, f"{self.label}:{i}", run, self.dim, self.coded and self.coded.run(run, i * step))
            for i, run in enumerate(self.values.split(step))
        ]


class Wide(list[Tensor]):
    """The values of several moments in at least float32, to be changed in place.

    ``buffers``: of those that are kept in 8 bits, which share memory where their rows are equally long: the
    indices of moments whose values are the rows of one tensor, and this tensor.
    """

    def __init__(self, values: Sequence[Tensor], buffers: Sequence[tuple[list[int], Tensor]]) -> None:
        super().__init__(values)
        self.buffers = buffers


class StateKeeper:
    """Stores moments in float32, bfloat16 or 8 bits. They are computed in float32 (float64 for such weights).

    bfloat16 moments are rounded stochastically, with a generator seeded by (run seed, label, step); of those
    in 8 bits (``rsotrain.optim.blocks``) second moments are, with random numbers that belong to the place in
    the whole moment, so that every number of ranks keeps the same ones. ``dtype``: int8 for these.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.seed = seed

    @property
    def coded(self) -> bool:
        return self.dtype is torch.int8

    @property
    def reduced(self) -> bool:
        """Do ``read`` and ``write`` convert?"""
        return self.coded or self.dtype is torch.bfloat16

    def moment(
        self,
        key: str,
        shape: Sequence[int],
        like: Tensor,
        *,
        label: str,
        dim: int | None = None,
        coded: CodedMoment | None = None,
    ) -> Moment:
        """A moment of zeros of ``shape`` (this rank's piece), for the dtype and on the device of ``like``.

        ``coded``: of the same shape, in 8 bits, where it is kept so.
        """
        if coded is not None:
            return Moment(key, label, coded.codes, dim, coded)
        dtype = self.dtype if self.dtype is torch.bfloat16 else work_dtype(like.dtype)
        return Moment(key, label, torch.zeros(tuple(shape), dtype=dtype, device=like.device), dim)

    def read(self, moments: Sequence[Moment]) -> Wide:
        """The values in at least float32: the stored tensors if they are, else copies."""
        values = [m.values if m.coded else m.values.to(work_dtype(m.values.dtype)) for m in moments]
        buffers = widened([m.coded for m in moments])
        for indices, buffer in buffers:
            counts = [moments[i].values.shape[0] for i in indices]
            for i, own in zip(indices, buffer.split(counts), strict=True):
                values[i] = own
        return Wide(values, buffers)

    def write(self, moments: Sequence[Moment], values: Wide, step: int, reason: str = "") -> None:
        """Store values that ``read`` returned and that were changed in place. They may be overwritten.

        ``reason``: names a second write in one step, so that it is rounded with other random numbers.
        """
        for moment, value in zip(moments, values, strict=True):
            if moment.coded is None and value is not moment.values:
                label = f"{moment.label}.{reason}" if reason else moment.label
                random = generator(self.seed, "rounding", label, step, device=value.device)
                stochastic_round_(moment.values, value, random)
        for indices, buffer in values.buffers:
            coded = [own for i in indices if (own := moments[i].coded) is not None]
            encode(coded, buffer, self.seed, f"{step}.{reason}")
