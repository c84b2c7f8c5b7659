"""Random numbers as a pure function of their purpose, so that no generator state has to be saved."""

import hashlib

import torch


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
