"""What the training code tells whoever watches its memory, and what it asks the planner.

Without a watcher a phase costs a function call. Imported by the model and the trainer, so it imports no
other module of the package.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum

import torch


class Phase(Enum):
    """Parts of a training step. refresh: the drawing of new bases, inside the optimizer's step."""

    forward = "forward"
    backward = "backward"
    optimizer_step = "optimizer step"
    refresh = "refresh"


Watcher = Callable[[Phase], AbstractContextManager[None]]


@dataclass(frozen=True)
class _Plan:
    kind: str
    watcher: Watcher


_plan: _Plan | None = None  # of the step that is being planned


def phase(name: Phase) -> AbstractContextManager[None]:
    """Around the code of a phase of the training step."""
    return nullcontext() if _plan is None else _plan.watcher(name)


def device_kind(device: torch.device) -> str:
    """For code that does one thing on CPUs and another on GPUs: the kind of device to work for.

    A plan for a GPU is made where there may be none, with tensors on the CPU.
    """
    return device.type if _plan is None else _plan.kind


@contextmanager
def planning(kind: str, watcher: Watcher) -> Iterator[None]:
    """Inside the block ``device_kind`` answers ``kind`` ("cuda", "cpu"), wherever the tensors are, and
    ``watcher`` wraps every phase that is entered."""
    global _plan
    before, _plan = _plan, _Plan(kind, watcher)
    try:
        yield
    finally:
        _plan = before
