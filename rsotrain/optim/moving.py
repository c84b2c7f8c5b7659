"""Moves many weights by one kernel, each rounded once: W ← kept·W + η·U. The way of weights on GPUs.

An operation of its own, so that a plan sees what a GPU does: one kernel and no temporaries. Without Triton
the same is done by operations of torch, a bounded run of rows at a time. Stochastic rounding takes random
numbers that are counted: each is a function of (run seed, parameter, step, place in the whole weight).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor

from rsotrain.optim.rounding import Keys, counted_noise, round_by_

_RUN_ELEMENTS = 1 << 23  # at a time without Triton: 32 MiB in float32
_MAX_ELEMENTS = 1 << 31  # of one weight: the kernel counts in int32


@dataclass(frozen=True)
class Place:
    """Where a piece lies in its whole weight of ``width`` columns, and the keys of the weight's name."""

    row: int
    column: int
    width: int
    key0: int
    key1: int


_FIELDS = 5


def move_all_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    kept: float,
    *,
    places: Sequence[Place] | None = None,
    step: Keys = (0, 0),
) -> None:
    """W ← kept·W + lr·U for each pair of matrices (or vectors) of one shape; all W of one dtype, all U too.

    ``kept`` 0 reads no weight. Updates are best the parts of one tensor: each storage takes a kernel.
    ``places``: of the weights, which are bfloat16, to round them stochastically; None: to nearest. ``step``:
    its keys.
    """
    flat = [] if places is None else [value for place in places for value in astuple(place)]
    _move_weights_(list(weights), list(updates), lr, kept, flat, *step)


@torch.library.custom_op("rsotrain::move_weights_", mutates_args={"weights"})
def _move_weights_(
    weights: list[Tensor],
    updates: list[Tensor],
    lr: float,
    kept: float,
    places: list[int],
    step0: int,
    step1: int,
) -> None:
    own: list[Place | None] = [None] * len(weights)
    if places:
        own = [Place(*places[i : i + _FIELDS]) for i in range(0, len(places), _FIELDS)]
    if weights[0].is_cuda and _has_triton() and weights[0].dtype is not torch.float64:
        _move_by_triton(weights, updates, own, lr, kept, (step0, step1))
        return
    for weight, update, place in zip(weights, updates, own, strict=True):
        _move_by_torch(weight, update, place, lr, kept, (step0, step1))


@_move_weights_.register_fake
def _(
    weights: list[Tensor],
    updates: list[Tensor],
    lr: float,
    kept: float,
    places: list[int],
    step0: int,
    step1: int,
) -> None:
    assert all(w.shape == u.shape for w, u in zip(weights, updates, strict=True))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)


def _move_by_torch(
    weight: Tensor, update: Tensor, place: Place | None, lr: float, kept: float, step: Keys
) -> None:
    weight, update = _as_matrix(weight), _as_matrix(update)
    length = max(1, _RUN_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], length):
        out, own = weight[start : start + length], update[start : start + length]
        wide = torch.promote_types(out.dtype, torch.float32)
        value = torch.mul(own.to(wide), lr)
        if kept:
            value.add_(out.to(wide).mul_(kept))
        if place is None:
            out.copy_(value)
            continue
        rows, columns = (
            torch.arange(first, first + size, dtype=torch.int32, device=out.device)
            for first, size in zip((place.row + start, place.column), out.shape, strict=True)
        )
        round_by_(out, value, counted_noise(rows, columns, place.width, (place.key0, place.key1), step))


def _move_by_triton(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    places: Sequence[Place | None],
    lr: float,
    kept: float,
    step: Keys,
) -> None:
    from rsotrain.optim.moving_triton import launch

    kinds: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, update in enumerate(updates):
        kinds.setdefault((update.untyped_storage().data_ptr(), update.dtype), []).append(i)
    for indices in kinds.values():
        table = []
        for i in indices:
            weight, update, place = _as_matrix(weights[i]), _as_matrix(updates[i]), places[i]
            assert weight.numel() < _MAX_ELEMENTS
            own = (0,) * _FIELDS if place is None else astuple(place)
            offset, strides = update.storage_offset(), (*weight.stride(), *update.stride())
            table.append((weight.data_ptr(), offset, *weight.shape, *strides, *own))
        launch(tuple(table), weights[indices[0]], updates[indices[0]], lr, kept, step, places[0] is not None)
