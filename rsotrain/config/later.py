"""Fields that were added to the configuration after runs had been made without them."""

import dataclasses
from typing import Any

_LATER = "later"  # of a field's metadata


def later(default: Any) -> Any:
    """A dataclass field whose default stands for what runs did before the field existed.

    At its default it takes no part in the identity of a run: a folder whose ``config.yaml`` lacks the field
    goes on, and the name that is made from the settings stays the same. ``default``: a value, or a field
    that another function has made. Of a nested dataclass all the fields are marked.
    """
    field = default if isinstance(default, dataclasses.Field) else dataclasses.field(default=default)
    metadata = dict(field.metadata) | {_LATER: True}
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=metadata)
    return dataclasses.field(default=field.default, metadata=metadata)


def is_later(field: "dataclasses.Field[Any]") -> bool:
    return bool(field.metadata.get(_LATER))
