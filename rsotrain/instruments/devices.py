"""The kind of device that code chooses its working buffers for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_planned: str | None = None  # of the run that is being planned


def device_kind(device: torch.device) -> str:
    """ "cpu" or "cuda": that of ``device``, or in a plan that of the planned run.

    A plan for a GPU is made with tensors on the CPU, and its buffers are to be the GPU's.
    """
    return _planned or device.type


@contextmanager
def planning_for(kind: str) -> Iterator[None]:
    """Inside the block all tensors stand for those of a device of this kind."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before
