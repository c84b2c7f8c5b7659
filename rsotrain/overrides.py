"""What a user types on the command line: spelling mended where the meaning is plain, names looked up."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rsotrain.config import SCHEMAS, Config

_ASSIGNMENT = re.compile(r"^(?P<key>\+{0,2}[A-Za-z_][\w.]*)=(?P<value>.*)$", re.DOTALL)
_INTEGRAL_FLOAT = re.compile(r"^[+-]?\d+(\.0*)?([eE]\+?\d+)?$")


def _field_types() -> dict[str, set[Any]]:
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


def known_keys() -> list[str]:
    """Every key and group that a command line can set."""
    return sorted(set(_field_types()) | set(SCHEMAS) | {"experiment", "tuned"})


def _takes_integers_only(key: str) -> bool:
    def plain(annotation: Any) -> set[Any]:
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            return set(typing.get_args(annotation)) - {type(None)}
        return {annotation}

    annotations = _field_types().get(key, set())
    return bool(annotations) and all(plain(a) == {int} for a in annotations)


def _normalise_value(value: str, integer: bool) -> str:
    if value == "None":
        return "null"
    if integer and _INTEGRAL_FLOAT.match(value) and abs(float(value)) < 2**53:
        return str(int(float(value)))
    return value


def normalise(arguments: Sequence[str]) -> list[str]:
    """Values as other programs write them (W&B: ``None``, ``1000000000.0``) in the form Hydra takes."""
    out = []
    for argument in arguments:
        match = _ASSIGNMENT.match(argument)
        if match and not re.search(r"[\[\]{}()'\"]", match["value"]):
            integer = _takes_integers_only(match["key"].lstrip("+"))
            values = [_normalise_value(v, integer) for v in match["value"].split(",")]
            argument = f"{match['key']}={','.join(values)}"
        out.append(argument)
    return out


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
