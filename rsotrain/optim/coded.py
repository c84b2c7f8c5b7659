"""Moments in 8 bits as a rank holds them; those with equally long rows are converted together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsotrain.instruments.devices import device_kind
from rsotrain.optim.blocks import by_blocks, decode, encode_signed_, encode_unsigned_, scales_shape
from rsotrain.optim.rounding import random_factors

# Elements that are encoded at a time, which takes four float32 buffers of that size
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 1 << 20, 1 << 22


@dataclass(frozen=True, eq=False)
class CodedMoment:
    """``codes``: of the moment's shape; ``scales``: one for each block, as ``blocks.scales_shape`` says.

    ``label``: seeds the rounding; the same for all pieces of a moment. ``whole``: the shape of the whole
    moment. ``start``: the row and the column of it with which this piece begins. ``dim``: that of the blocks.
    """

    codes: Tensor
    scales: Tensor
    label: str
    whole: tuple[int, int]
    start: tuple[int, int]
    dim: int
    block: int

    @classmethod
    def zeros(
        cls,
        shape: Sequence[int],
        whole: tuple[int, int],
        start: tuple[int, int],
        dim: int,
        block: int,
        *,
        unsigned: bool,
        label: str,
        device: torch.device,
    ) -> "CodedMoment":
        codes = torch.zeros(tuple(shape), dtype=torch.uint8 if unsigned else torch.int8, device=device)
        scales = torch.zeros(scales_shape(shape, dim, block), device=device)
        return cls(codes, scales, label, whole, start, dim, block)

    @property
    def unsigned(self) -> bool:
        return self.codes.dtype is torch.uint8

    @property
    def rows_of_block(self) -> int:
        return self.block if self.dim == 0 else 1

    def run(self, codes: Tensor, row: int) -> "CodedMoment":
        """The part of whole blocks whose codes these are, beginning with this piece's ``row``."""
        per = self.rows_of_block
        scales = self.scales[row // per : (row + codes.shape[0]) // per]
        return replace(self, codes=codes, scales=scales, start=(self.start[0] + row, self.start[1]))

    def row_factors(self, seed: int, step: str) -> Tensor:
        device, (row, _) = self.codes.device, self.start
        factors = random_factors(self.whole[0], seed, "rounding", self.label, step, device=device)
        return factors[row : row + self.codes.shape[0]]

    def column_factors(self, seed: int, step: str) -> Tensor:
        device, (_, column) = self.codes.device, self.start
        size = self.whole[1]
        factors = random_factors(size, seed, "rounding", "columns", size, step, device=device)
        return factors[column : column + self.codes.shape[1]]


def widened(moments: Sequence[CodedMoment | None]) -> list[tuple[list[int], Tensor]]:
    """The values in float32: for each kind of moment their indices and one tensor of all their rows."""
    kinds: dict[object, list[int]] = {}
    for i, m in enumerate(moments):
        if m is not None:
            alone = i if m.dim == 0 else None
            kind = (m.codes.shape[1], m.start[1], m.block, m.unsigned, m.codes.device, alone)
            kinds.setdefault(kind, []).append(i)
    result = []
    for indices in kinds.values():
        own = [m for i in indices if (m := moments[i]) is not None]
        first = own[0]
        codes = by_blocks(_joined([m.codes for m in own]), first.dim, first.block)
        scales = _by_scales(_joined([m.scales for m in own]), first)
        values = decode(codes, scales, unsigned=first.unsigned)
        result.append((indices, values.view(-1, first.codes.shape[1])))
    return result


def encode(moments: Sequence[CodedMoment], values: Tensor, seed: int, step: str) -> None:
    """Store ``values``, a tensor that ``widened`` has made for these moments; it is overwritten."""
    first = moments[0]
    factors = None
    if first.unsigned:
        rows = _joined([m.row_factors(seed, step) for m in moments])
        factors = rows.unsqueeze(1), first.column_factors(seed, step)
    codes = torch.empty(values.shape, dtype=first.codes.dtype, device=values.device)
    scales = torch.empty(scales_shape(values.shape, first.dim, first.block), device=values.device)
    limit = _CPU_ELEMENTS if device_kind(values.device) == "cpu" else _DEVICE_ELEMENTS
    per = first.rows_of_block
    length = max(1, limit // max(1, per * values.shape[1])) * per
    for start in range(0, values.shape[0], length):
        run, own = slice(start, start + length), slice(start // per, (start + length) // per)
        blocks = by_blocks(values[run], first.dim, first.block)
        if factors is None:
            found, sizes = encode_signed_(blocks)
        else:
            random = by_blocks(factors[0][run] * factors[1], first.dim, first.block)
            found, sizes = encode_unsigned_(blocks, random)
        codes[run] = found.view(-1, values.shape[1])
        scales[own] = sizes.view(-1, scales.shape[1])
    torch._foreach_copy_([m.codes for m in moments], codes.split([len(m.codes) for m in moments]))
    torch._foreach_copy_([m.scales for m in moments], scales.split([len(m.scales) for m in moments]))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _by_scales(scales: Tensor, moment: CodedMoment) -> Tensor:
    return scales.unsqueeze(1) if moment.dim == 0 else scales.reshape(-1, 1, 1)
