"""A context around the work of a run, which callers pass in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rsotrain.config.schema import Config
from rsotrain.parallel.ranks import World

# Entered before model and optimizer allocate memory, left after the last step. The planner's guard says what
# would help when memory runs out; passing it in keeps training independent of the planner.
Guard = Callable[[Config, World], AbstractContextManager[None]]


def unguarded(config: Config, world: World) -> AbstractContextManager[None]:
    return nullcontext()
