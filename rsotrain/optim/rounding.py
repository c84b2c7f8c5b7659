"""Stochastic rounding to bfloat16, and random numbers that do not depend on the number of ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsotrain.subspace.seeding import generator, mixed_, seed_of, signed

Keys = tuple[int, int]  # 64 random bits in two int32


def _random_16_bits(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``count`` uniform int32 integers in [0, 2¹⁶), four from each random 64-bit word."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


def random_factors(size: int, seed: int, *labels: str | int, device: torch.device) -> Tensor:
    """``size`` uniform odd int32 numbers; the product of two of them, modulo 2³², has random upper bits.

    Element (i, j) of a matrix gets a_i·b_j, with a factor for each row of the whole and one for each column.
    So the number belongs to the place in the whole, whatever piece of it is here, and costs one
    multiplication. The numbers of two elements are as good as independent; those of the four corners of a
    rectangle are not quite, which no sum over a weight can notice.
    """
    factors = torch.empty(size, dtype=torch.int32, device=device)
    random = generator(seed, *labels, device=device)
    return factors.random_(-(2**31), 2**31 - 1, generator=random).bitwise_or_(1)


def stochastic_round_(out: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """out ← value, rounded up or down at random such that the expectation is ``value``.

    Rounding to nearest would turn v·0.999 back into v in bfloat16, so with β₂ = 0.999 the second moment would
    never decay. ``out``: bfloat16; ``value``: float32, finite, of the same shape; both may be
    non-contiguous.
    """
    _round_(out, value, _random_16_bits(value.numel(), generator, value.device).view(value.shape))


def stochastic_round_by_(out: Tensor, value: Tensor, factors: Sequence[Tensor]) -> None:
    """The same with the random numbers of ``random_factors``: one factor for each dimension of ``out``."""
    random = factors[0] if len(factors) == 1 else factors[0].unsqueeze(1) * factors[1]
    _round_(out, value, (random >> 16).bitwise_and_(0xFFFF))


def keys_of(seed: int, *labels: str | int) -> Keys:
    """The keys of a purpose, as ``seeding.generator`` has its seeds."""
    bits = seed_of(seed, *labels)
    return signed(bits), signed(bits >> 31)


def counted_noise(rows: Tensor, columns: Tensor, width: int, name: Keys, step: Keys) -> Tensor:
    """Uniform int32 in [0, 2¹⁶), one for each place of a weight; ``moving_triton`` has the same for GPUs.

    ``rows`` (m) and ``columns`` (n): int32, the places in the whole weight, of ``width`` columns. Keys of its
    ``name`` and of the ``step`` are mixed first, so that each step pairs other places by chance.
    """
    mixed = mixed_(torch.tensor([signed(a ^ b) for a, b in zip(name, step, strict=True)], dtype=torch.int32))
    x = rows.unsqueeze(1) * width + columns
    for key in mixed.tolist():
        mixed_(x.bitwise_xor_(key))
    return (x >> 16).bitwise_and_(0xFFFF)


def round_by_(out: Tensor, value: Tensor, noise: Tensor) -> None:
    """``stochastic_round_`` with ``noise``, uniform int32 in [0, 2¹⁶), which is overwritten."""
    _round_(out, value, noise)


def _round_(out: Tensor, value: Tensor, noise: Tensor) -> None:
    """``noise``: uniform int32 in [0, 2¹⁶), which is overwritten."""
    assert out.dtype is torch.bfloat16
    assert value.dtype is torch.float32
    # bfloat16 is the upper half of a float32: noise carries into it with the probability of the lower half
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-0x10000)
    out.copy_(bits.view(torch.float32))
