"""What may surround the work of a run, handed in from above."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rsotrain.config.schema import Config
from rsotrain.parallel.ranks import World

# Entered before model and optimizer take memory, left after the last step. The planner has one that says what
# would help when memory ends; who trains need not know the planner.
Guard = Callable[[Config, World], AbstractContextManager[None]]


def unguarded(config: Config, world: World) -> AbstractContextManager[None]:
    return nullcontext()
