"""Norms of gradients in float32, without a float32 copy of a whole gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor

from rsotrain.instruments.devices import device_kind

NORM_ELEMENTS = 1 << 20  # 4 MiB of float32


def norms_of(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Norms (0-d, float32) whose squares sum to the squared norm of all ``gradients``.

    On a CPU, torch's norm converts a whole bfloat16 tensor to float32, so it gets pieces that fit the cache.
    """
    pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
    return list(torch._foreach_norm(pieces, 2, dtype=torch.float32)) if pieces else []


def _pieces(gradient: Tensor) -> tuple[Tensor, ...]:
    wide = gradient.dtype.itemsize >= torch.float32.itemsize
    if wide or device_kind(gradient.device) != "cpu":
        return (gradient,)
    return gradient.reshape(-1).split(NORM_ELEMENTS)
