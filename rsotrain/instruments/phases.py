"""Phases of the training step, which a watcher can observe.

Without a watcher a phase costs a function call.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum


class Phase(Enum):
    """Parts of a training step. refresh: sampling new bases, inside the optimizer step."""

    forward = "forward"
    backward = "backward"
    optimizer_step = "optimizer step"
    refresh = "refresh"


Watcher = Callable[[Phase], AbstractContextManager[None]]


_watcher: Watcher | None = None  # of the step that is being planned


def phase(name: Phase) -> AbstractContextManager[None]:
    """Around the code of a phase of the training step."""
    return nullcontext() if _watcher is None else _watcher(name)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside the block ``watcher`` wraps every phase that is entered."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
