"""The kernel of ``moving``: one launch for a list of weights, of any shapes and strides.

A table on the device says where each weight and its update lie. It is the same from step to step, as long as
torch's allocator gives the updates the memory that it gave them before, and is then not sent again.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rsotrain.optim.rounding import Keys

_BLOCK = 2048
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ENTRY = 13  # numbers of a weight in the table
Table = tuple[tuple[int, ...], ...]


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["step0", "step1"])
def _move(  # type: ignore[no-untyped-def]
    table,
    updates,
    lr,
    kept,
    step0,
    step1,
    ENTRY: tl.constexpr,
    WEIGHT: tl.constexpr,
    KEEPS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = table + tl.program_id(1) * ENTRY
    rows = tl.load(entry + 2).to(tl.int32)
    columns = tl.load(entry + 3).to(tl.int32)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (index >= 0) & (index < rows * columns)  # less than 0 where it is beyond int32
    row = index // columns
    column = index - row * columns
    weights = tl.load(entry).to(tl.pointer_type(WEIGHT))
    targets = weights + row * tl.load(entry + 4) + column * tl.load(entry + 5)
    sources = updates + tl.load(entry + 1) + row * tl.load(entry + 6) + column * tl.load(entry + 7)
    value = tl.load(sources, mask=inside, other=0.0).to(tl.float32) * lr
    if KEEPS:
        value += tl.load(targets, mask=inside, other=0.0).to(tl.float32) * kept
    if STOCHASTIC:
        place_row = (row + tl.load(entry + 8).to(tl.int32)).to(tl.uint32)
        place_column = (column + tl.load(entry + 9).to(tl.int32)).to(tl.uint32)
        noise = place_row * tl.load(entry + 10).to(tl.uint32) + place_column
        key0 = tl.load(entry + 11).to(tl.uint32) ^ step0.to(tl.uint32)
        key1 = tl.load(entry + 12).to(tl.uint32) ^ step1.to(tl.uint32)
        noise = _mixed(_mixed(noise ^ _mixed(key0)) ^ _mixed(key1)) >> 16
        bits = value.to(tl.uint32, bitcast=True) + noise
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(targets, value.to(WEIGHT), mask=inside)


@lru_cache(maxsize=4096)
def _on_device(table: Table, device: torch.device) -> Tensor:
    host = torch.tensor(table, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def launch(
    table: Table, weight: Tensor, update: Tensor, lr: float, kept: float, step: Keys, stochastic: bool
) -> None:
    """Move the weights of ``table``, in which each has its address, the place of its update in the storage,
    its shape, the strides of both, and its ``moving.Place``. ``weight``, ``update``: one of each, for their
    dtype and storage."""
    largest = max(entry[2] * entry[3] for entry in table)
    if largest == 0:
        return
    assert len(table[0]) == _ENTRY
    storage = update.as_strided((1,), (1,), 0)
    _move[triton.cdiv(largest, _BLOCK), len(table)](
        _on_device(table, weight.device),
        storage,
        lr,
        kept,
        *step,
        ENTRY=_ENTRY,
        WEIGHT=_DTYPES[weight.dtype],
        KEEPS=kept != 0.0,
        STOCHASTIC=stochastic,
        BLOCK=_BLOCK,
    )
