"""What the training code tells whoever watches its memory, and what it asks the planner.

Without a watcher a phase costs a function call. Imported by the model and the trainer, so it imports no
other module of the package.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum

import torch


class Phase(Enum):
    """Parts of a training step. refresh: the drawing of new bases, inside the optimizer's step."""

    forward = "forward"
    backward = "backward"
    optimizer_step = "optimizer step"
    refresh = "refresh"


Watcher = Callable[[Phase], AbstractContextManager[None]]

_watcher: Watcher | None = None
_planned_kind: str | None = None


def phase(name: Phase) -> AbstractContextManager[None]:
    """Around the code of a phase of the training step."""
    return nullcontext() if _watcher is None else _watcher(name)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have ``watcher`` wrap every phase that is entered inside the block."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


@contextmanager
def planned_device(kind: str) -> Iterator[None]:
    """Inside the block ``device_kind`` answers ``kind`` ("cuda", "cpu"), wherever the tensors are."""
    global _planned_kind
    before, _planned_kind = _planned_kind, kind
    try:
        yield
    finally:
        _planned_kind = before


def device_kind(device: torch.device) -> str:
    """For code that does one thing on CPUs and another on GPUs: the kind of device to work for.

    A plan for a GPU is made where there may be none, with tensors on the CPU.
    """
    return _planned_kind or device.type
