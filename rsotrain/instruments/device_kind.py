"""The kind of device that code prepares its work for: where its tensors are, or what a plan is made for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_planned: str | None = None  # of the plan that is being made


def device_kind(device: torch.device) -> str:
    """ "cpu", "cuda" …: what tensors on ``device`` stand for. A plan for a GPU has its tensors on the CPU."""
    return _planned or device.type


@contextmanager
def planning_for(kind: str) -> Iterator[None]:
    """Inside the block all tensors stand for those of this kind of device."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before
