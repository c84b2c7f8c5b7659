"""The keys of the configuration: dotted names, their types, their values as plain data."""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from rsotrain.config.later import Later, later_of
from rsotrain.config.schema import SCHEMAS, Config

T = TypeVar("T")


def field_types() -> dict[str, set[Any]]:
    """Dotted key -> the types that any schema gives it."""
    found: dict[str, set[Any]] = {}
    for key, f, _ in _leaves():
        found.setdefault(key, set()).add(f.type)
    return found


def later_fields(config: Config | None = None) -> dict[str, Later]:
    """Dotted key -> what ``later`` said of each field that it marks, values as plain data.

    ``matters_with`` is a dotted key here, too. Of the schemas that ``config`` has chosen; None: of all.
    """
    return _later(_leaves(config))


def later_fields_of(settings: Mapping[str, Any]) -> dict[str, Later]:
    """``later_fields`` of the schemas that flat ``settings``, which may be older than some fields, are of.

    Files of ``conf/`` mostly have the name of their schema. Where one has not, its schema is one of those
    with the same older keys; where there is none either, it may be any of the group.
    """
    found: dict[str, Later] = {}
    for f in dataclasses.fields(Config):
        schemas = SCHEMAS.get(f.name, {"": f.type})
        every = {name: list(_leaves_of(f, kind, "", False)) for name, kind in schemas.items()}
        later_keys = {key for leaves in every.values() for key, _, marked in leaves if marked}
        given = {key for key in settings if key.split(".")[0] == f.name} - later_keys
        fitting = {
            name: leaves
            for name, leaves in every.items()
            if {key for key, _, _ in leaves} - later_keys == given
        }
        called = str(settings.get(f"{f.name}.name"))  # of a damaged folder it may be anything
        chosen = [fitting[called]] if called in fitting else list((fitting or every).values())
        for leaves in chosen:
            found |= _later(leaves)
    return found


def _later(leaves: Iterable[tuple[str, "dataclasses.Field[Any]", bool]]) -> dict[str, Later]:
    found: dict[str, Later] = {}
    for key, f, marked in leaves:
        if marked:
            factory, own = f.default_factory, later_of(f)
            default = plain(f.default if factory is dataclasses.MISSING else factory())
            said = Later(default, default, "", default)
            if own is not None and factory is dataclasses.MISSING:
                sibling = own.matters_with and key.removesuffix(f.name) + own.matters_with
                said = Later(default, plain(own.before), sibling, plain(own.of_new_runs))
            assert found.setdefault(key, said) == said, f"{key} has two defaults, but later() needs one"
    return found


def _leaves(config: Config | None = None) -> Iterator[tuple[str, "dataclasses.Field[Any]", bool]]:
    """(dotted key, field, whether ``later`` marks it) of every schema; keys of several are repeated."""
    for f in dataclasses.fields(Config):
        chosen: list[Any] = [f.type]
        if f.name in SCHEMAS:
            chosen = list(SCHEMAS[f.name].values()) if config is None else [type(getattr(config, f.name))]
        for schema in chosen:
            yield from _leaves_of(f, schema, "", False)


def _leaves_of(
    f: "dataclasses.Field[Any]", kind: Any, prefix: str, marked: bool
) -> Iterator[tuple[str, "dataclasses.Field[Any]", bool]]:
    marked = marked or later_of(f) is not None
    if not dataclasses.is_dataclass(kind):
        yield f"{prefix}{f.name}", f, marked
        return
    for inner in dataclasses.fields(kind):
        yield from _leaves_of(inner, inner.type, f"{prefix}{f.name}.", marked)


def kinds(annotation: Any) -> set[Any]:
    """The types that a value of a field may have, those in a list included; None is left out."""
    if parts := typing.get_args(annotation):
        return set().union(*map(kinds, parts))
    return set() if annotation is type(None) else {annotation}


@functools.cache
def keys_of(kind: type) -> frozenset[str]:
    """The keys whose values are of this type alone, or lists of it, in every schema that has them."""
    types = field_types()
    return frozenset(key for key in types if all(kinds(annotation) == {kind} for annotation in types[key]))


def known_keys() -> list[str]:
    """Every key and group that a command line can set."""
    return sorted(set(field_types()) | set(SCHEMAS) | {"experiment", "tuned"})


def list_of(key: str) -> str:
    """The key of the list that ``optimizer.groups.0.lr`` is in; any other key itself."""
    return re.sub(r"^(optimizer\.groups)\.\d+(\..+)?$", r"\1", key)


def did_you_mean(name: str, candidates: Sequence[str]) -> str:
    """ "; did you mean a, b?" with the nearest names, or the empty string."""
    near = _near(name, [c for c in candidates if c != name and not name.startswith(f"{c}.")])
    return f"; did you mean {', '.join(near[:3])}?" if near else ""


def _near(name: str, candidates: Sequence[str]) -> list[str]:
    """Keys of the same group by the last part alone, since all have the rest in common; else keys as a whole.

    Where there is no such group, keys by the last part (optimizer.lr for lr), else groups (evaluation.… for
    evalation).
    """
    group, point, last = name.rpartition(".")
    own = {c.removeprefix(f"{group}."): c for c in candidates if point and c.startswith(f"{group}.")}
    if own and (near := [own[c] for c in difflib.get_close_matches(last, own)]):
        return near
    others = [c for c in candidates if ("." in c) == bool(point) and c not in own.values()]
    if near := difflib.get_close_matches(name, others):
        return near
    if own:
        return []
    lasts = {c: c.rpartition(".")[2] for c in candidates}
    alike = difflib.get_close_matches(last, list(lasts.values()))
    if near := [c for c in candidates if lasts[c] in alike]:
        return near
    groups = {c.partition(".")[0] for c in candidates if "." in c}
    return [f"{found}.…" for found in difflib.get_close_matches(name, sorted(groups))]


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


def with_values(config: T, values: Mapping[str, Any]) -> T:
    """A dataclass with other values, in plain form, under some dotted keys."""
    if not values:
        return config
    parts: dict[str, Any] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        parts.setdefault(name, {})[rest] = value
    changed = {}
    for name, inner in parts.items():
        old = getattr(config, name)
        if "" not in inner:
            changed[name] = with_values(old, inner)
            continue
        annotation = next(f.type for f in dataclasses.fields(config) if f.name == name)  # type: ignore[arg-type]
        changed[name] = _typed(annotation, inner[""], name)
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def without_keys(mapping: Mapping[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """A nested mapping without the leaves of some dotted keys."""
    return {
        key: without_keys(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if f"{prefix}{key}" not in keys
    }


def from_plain(kind: type[T], values: Any, prefix: str = "") -> T:
    """The dataclass whose ``plain`` form ``values`` has; fields that it lacks have their defaults.

    Other keys are left out, since what was written by a later version may have some. Raises ValueError for a
    value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'it'} is no mapping")
    known = {f.name: f.type for f in dataclasses.fields(kind) if f.name in values}  # type: ignore[arg-type]
    return kind(**{name: _typed(type_, values[name], f"{prefix}{name}") for name, type_ in known.items()})


def _typed(type_: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(type_):
        return from_plain(type_, value, f"{key}.")  # type: ignore[arg-type]
    for kind in typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,):
        origin = typing.get_origin(kind)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            inner = typing.get_args(kind)[0]  # of all members: no schema has a tuple of several types
            return origin(_typed(inner, item, key) for item in value)
        if origin is None and issubclass(kind, Enum):
            if isinstance(value, str) and value in kind.__members__:
                return kind[value]
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif origin is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    raise ValueError(f"{key} is {str(value)[:60]!r}")
