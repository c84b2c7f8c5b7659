"""Stochastic rounding to bfloat16."""

import torch
from torch import Tensor


def _random_16_bits(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``count`` uniform int32 integers in [0, 2¹⁶), four from each random 64-bit word."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


def stochastic_round_(out: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """out ← value, rounded up or down at random such that the expectation is ``value``.

    Rounding to nearest would turn v·0.999 back into v in bfloat16, so with β₂ = 0.999 the second moment would
    never decay. ``out``: bfloat16; ``value``: float32, finite, of the same shape; both may be
    non-contiguous.
    """
    assert out.dtype is torch.bfloat16
    assert value.dtype is torch.float32
    noise = _random_16_bits(value.numel(), generator, value.device).view(value.shape)
    # bfloat16 is the upper half of a float32: noise carries into it with the probability of the lower half
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-0x10000)
    out.copy_(bits.view(torch.float32))
