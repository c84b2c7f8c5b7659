"""Random numbers as a pure function of their purpose, so that no generator state has to be saved."""

import hashlib
import math

import torch
from torch import Tensor

_PAIRS_AT_A_TIME = 1 << 22  # of normal numbers: 16 MiB a buffer


def generator(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded from the run's seed and ``labels`` (such as parameter name and refresh index).

    It is the same on every rank and after a resume. Its numbers differ between CPU and CUDA.
    """
    return torch.Generator(device=device).manual_seed(seed_of(seed, *labels))


def seed_of(seed: int, *labels: str | int) -> int:
    """The seed of ``generator``, 63 bits."""
    text = "\0".join(str(label) for label in (seed, *labels))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def counted_normals(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Independent N(0, 1) numbers, (rows, columns) in float32, each a function of ``seed`` and its place.

    A generator of a GPU gives other numbers on another model of GPU, and one of the CPU has a GPU wait.
    These are the same everywhere, up to the rounding of logarithms and cosines (Box–Muller). ``seed``: 63
    bits.
    """
    pairs = (rows * columns + 1) // 2
    keys = [signed(seed_of(seed, "round", i)) for i in range(2)]
    result = torch.empty(2, pairs, device=device)
    for start in range(0, pairs, _PAIRS_AT_A_TIME):
        stop = min(start + _PAIRS_AT_A_TIME, pairs)
        radius, angle = (
            _uniform(
                torch.arange(start + half * pairs, stop + half * pairs, dtype=torch.int32, device=device),
                keys,
            )
            for half in range(2)
        )
        radius.log_().mul_(-2.0).sqrt_()
        angle.mul_(2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=result[0, start:stop])
        torch.mul(radius, angle.sin_(), out=result[1, start:stop])
    return result.view(-1)[: rows * columns].view(rows, columns)


def _uniform(counters: Tensor, keys: list[int]) -> Tensor:
    """Uniform numbers in (0, 1]. ``counters``: distinct int32, which are overwritten."""
    for key in keys:
        mixed_(counters.bitwise_xor_(key))
    return counters.to(torch.float32).mul_(2.0**-32).add_(0.5).clamp_(min=2.0**-33)


def mixed_(x: Tensor) -> Tensor:
    """A permutation of all int32 in which every bit depends on every other, in place (Wellons' lowbias32)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(signed(0x7FEB352D))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def signed(word: int) -> int:
    """The low 32 bits of ``word`` as torch's int32 has them."""
    low = word & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low
