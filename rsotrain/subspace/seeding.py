"""Random numbers as a pure function of their purpose, so that no generator state has to be saved."""

import hashlib
import math
from collections.abc import Sequence

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


def counted_normals(rows: int, columns: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Independent N(0, 1) numbers, (seeds, rows, columns) in float32, functions of a seed and their place.

    A generator of a GPU gives other numbers on another model of GPU, and one of the CPU has a GPU wait.
    These are the same everywhere, up to the rounding of logarithms and cosines (Box–Muller). ``seeds``: 63
    bits each; a matrix of numbers depends on its own alone.
    """
    count = len(seeds)
    pairs = (rows * columns + 1) // 2
    keys = _keys(seeds, device)
    result = torch.empty(count, 2, pairs, device=device)
    run = max(1, _PAIRS_AT_A_TIME // count)
    for start in range(0, pairs, run):
        stop = min(start + run, pairs)
        radius, angle = (
            _mixed(start + half * pairs, stop + half * pairs, keys)
            .to(torch.float32)
            .mul_(2.0**-32)
            .add_(0.5)
            .clamp_(min=2.0**-33)
            for half in range(2)
        )
        radius.log_().mul_(-2.0).sqrt_()
        angle.mul_(2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=result[:, 0, start:stop])
        torch.mul(radius, angle.sin_(), out=result[:, 1, start:stop])
    return result.view(count, -1)[:, : rows * columns].view(count, rows, columns)


def counted_uniforms(size: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """The same of uniform numbers in (0, 1), (seeds, size) in float64, the same on every device."""
    return _mixed(0, size, _keys(seeds, device)).to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)


def _keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Two keys for each seed, (2, seeds, 1) in int32."""
    words = [[[signed(seed_of(seed, "round", i))] for seed in seeds] for i in range(2)]
    host = torch.tensor(words, dtype=torch.int32)
    if device.type == "cuda":  # for a copy from other memory the host would wait
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _mixed(start: int, stop: int, keys: Tensor) -> Tensor:
    """int32 numbers that look random, one for each seed and counter of the range."""
    counters = torch.arange(start, stop, dtype=torch.int32, device=keys.device)
    x = counters.bitwise_xor(keys[0])
    for i in range(2):
        if i > 0:
            x.bitwise_xor_(keys[i])
        mixed_(x)
    return x


def mixed_(x: Tensor) -> Tensor:
    """A permutation of all int32 in which every bit depends on every other, in place (Wellons' lowbias32)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(signed(0x7FEB352D))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def signed(word: int) -> int:
    """The low 32 bits of ``word`` as torch's int32 has them."""
    low = word & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low
