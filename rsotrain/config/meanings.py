"""What each key of the configuration means: said with its field, read by ``--help`` and by conf/README.md."""

import dataclasses
from typing import Any

_MEANING, _UNIT = "meaning", "unit"  # in a field's metadata


def means(meaning: str, default: Any = dataclasses.MISSING, *, unit: str | None = None) -> Any:
    """A dataclass field with its meaning: a phrase for the line of ``--help``.

    ``default``: a value, or a field that another function has made, as ``number`` does. ``unit``: what the
    number counts or is measured in, if it is not a plain factor.
    """
    field = default if isinstance(default, dataclasses.Field) else dataclasses.field(default=default)
    metadata = dict(field.metadata) | {_MEANING: meaning, _UNIT: unit}
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=metadata)
    return dataclasses.field(default=field.default, metadata=metadata)


def meaning_of(field: "dataclasses.Field[Any]") -> str:
    """The phrase; empty for a field without one, which a test forbids."""
    return str(field.metadata.get(_MEANING, ""))


def unit_of(field: "dataclasses.Field[Any]") -> str | None:
    unit = field.metadata.get(_UNIT)
    return None if unit is None else str(unit)
