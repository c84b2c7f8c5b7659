"""Norms of gradients, in float32, without a widened copy of any."""

from collections.abc import Iterable

import torch
from torch import Tensor

NORM_ELEMENTS = 1 << 20  # 4 MiB of float32


def norms_of(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Float32 norms, 0-d, whose squares add up to the squared norm of all ``gradients``.

    A CPU widens a whole bfloat16 tensor for its norm, so there it is taken of runs of a cache's worth.
    """
    pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
    return list(torch._foreach_norm(pieces, 2, dtype=torch.float32)) if pieces else []


def _pieces(gradient: Tensor) -> tuple[Tensor, ...]:
    wide = gradient.dtype.itemsize >= torch.float32.itemsize
    if wide or gradient.device.type != "cpu":
        return (gradient,)
    return gradient.reshape(-1).split(NORM_ELEMENTS)
