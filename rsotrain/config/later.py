"""Fields that were added to the configuration after runs had been made without them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

_LATER = "later"  # of a field's metadata


@dataclass(frozen=True)
class Later:
    """``before``: what runs did before the field existed. ``matters_with``: the name of a neighbouring field
    without which, where that is null, 0, false or empty, the field has no effect; empty: it always has.
    ``of_new_runs``: what new runs have unless they are told otherwise, which conf/ may derive from other
    settings."""

    default: Any
    before: Any
    matters_with: str
    of_new_runs: Any


_SAME = object()


def later(default: Any, *, before: Any = _SAME, matters_with: str = "", of_new_runs: Any = _SAME) -> Any:
    """A dataclass field whose default stands for what runs did before the field existed.

    At its default it takes no part in the name that is made from the settings, and a folder whose
    ``config.yaml`` lacks the field goes on. ``before``: what runs did before, where the default is something
    else: a folder without the field goes on with that, a new run has the default. ``matters_with`` and
    ``of_new_runs``, which is the default where it is not given: as in ``Later``. ``default``: a value, or a
    field that another function has made. Of a nested dataclass all the fields are marked.
    """
    field = default if isinstance(default, dataclasses.Field) else dataclasses.field(default=default)
    has_factory = field.default_factory is not dataclasses.MISSING
    assert before is _SAME or not has_factory, "a nested dataclass has no single value of its own"
    old = field.default if before is _SAME else before
    new = field.default if of_new_runs is _SAME else of_new_runs
    metadata = dict(field.metadata) | {_LATER: Later(field.default, old, matters_with, new)}
    if has_factory:
        return dataclasses.field(default_factory=field.default_factory, metadata=metadata)
    return dataclasses.field(default=field.default, metadata=metadata)


def later_of(field: "dataclasses.Field[Any]") -> Later | None:
    """What ``later`` said of a field; None for the others."""
    return field.metadata.get(_LATER)
