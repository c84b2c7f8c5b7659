"""Random numbers that are a pure function of what they are for, so that none are in any saved state."""

import hashlib

import torch


def generator(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded from the run's seed and ``labels`` (such as parameter name and refresh index).

    The same on every rank, and after a resume. Numbers differ between kinds of device.
    """
    return torch.Generator(device=device).manual_seed(seed_of(seed, *labels))


def seed_of(seed: int, *labels: str | int) -> int:
    """That of ``generator``: 63 bits."""
    text = "\0".join(str(label) for label in (seed, *labels))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
