"""The keys of the configuration: dotted names, their types, their values as plain data."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from rsotrain.config.schema import SCHEMAS, Config


def field_types() -> dict[str, set[Any]]:
    """Dotted key -> the types that any schema gives it."""
    found: dict[str, set[Any]] = {}
    for f in dataclasses.fields(Config):
        if f.name in SCHEMAS:
            for schema in SCHEMAS[f.name].values():
                for g in dataclasses.fields(schema):
                    found.setdefault(f"{f.name}.{g.name}", set()).add(g.type)
        elif dataclasses.is_dataclass(f.type):
            for g in dataclasses.fields(f.type):
                found.setdefault(f"{f.name}.{g.name}", set()).add(g.type)
        else:
            found.setdefault(f.name, set()).add(f.type)
    return found


def kinds(annotation: Any) -> set[Any]:
    """The types that a value of a field may have, those in a list included; None is left out."""
    if parts := typing.get_args(annotation):
        return set().union(*map(kinds, parts))
    return set() if annotation is type(None) else {annotation}


def known_keys() -> list[str]:
    """Every key and group that a command line can set."""
    return sorted(set(field_types()) | set(SCHEMAS) | {"experiment", "tuned"})


def did_you_mean(name: str, candidates: Sequence[str]) -> str:
    """ "; did you mean a, b?" with the nearest names, or the empty string."""
    candidates = [c for c in candidates if c != name]
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if not near:  # the last part alone: optimizer.learning_rate, or lr for optimizer.lr
        last = {c: c.rsplit(".", 1)[-1] for c in candidates}
        near_last = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last.values()))
        near = [c for c in candidates if last[c] in near_last]
    return f"; did you mean {', '.join(near[:3])}?" if near else ""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mapping -> (dotted key, leaf) pairs in order."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
