"""What ``rsotrain --help`` lists."""

import dataclasses
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rsotrain.cli.flags import config_dir
from rsotrain.config.defaults import conf_dir
from rsotrain.config.keys import kinds
from rsotrain.config.meanings import meaning_of, unit_of
from rsotrain.tracking.escaping import for_terminal

_WIDEST, _NARROWEST = 100, 72  # columns
_LONGEST_VALUE = 40  # of a key and its value that stand on one line with the meaning


def list_groups() -> str:
    """The groups and their options for ``--help``: a group a paragraph, models and recipes by size."""
    own = config_dir(sys.argv[1:])
    options: dict[str, set[str]] = {}
    for folder in [conf_dir(), *([] if own is None else [own])]:
        for file in folder.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    return "\n".join(
        textwrap.fill(
            for_terminal(f"{group}: {', '.join(sorted(names, key=by_size))}"),
            width=_width(),
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for group, names in sorted(options.items())
    )


def _width() -> int:
    """Columns of the text: the terminal's, within what can be read."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns))


def list_keys(_root_: DictConfig) -> str:
    """Each key of the chosen options with its value and, beside it, its meaning: a group a paragraph."""
    names = [field.name for field in _fields(_root_)]
    groups = [name for name in names if OmegaConf.is_config(_root_._get_node(name))]
    lines = list(_keys_of(_root_, "", [name for name in names if name not in groups]))
    for group in groups:
        lines += ["", *_keys_of(_root_[group], f"{group}.")]
    return "\n".join(lines).replace("$", "$$")  # Hydra fills in what follows a $


def _fields(node: DictConfig) -> "tuple[dataclasses.Field[Any], ...]":
    schema = OmegaConf.get_type(node)
    assert schema is not None
    return dataclasses.fields(schema)


def _keys_of(node: DictConfig, prefix: str, names: list[str] | None = None) -> Iterator[str]:
    for field in _fields(node):
        if names is not None and field.name not in names:
            continue
        value = node._get_node(field.name)
        if isinstance(value, DictConfig):
            yield from _keys_of(value, f"{prefix}{field.name}.")
        else:
            yield from _line(f"  {prefix}{field.name}={_shown(value)}", explain_key(field))


def _shown(node: Any) -> str:
    """A value as the command line takes it; what has to be given is ???."""
    value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    name = value.name if isinstance(value, Enum) else value
    return "null" if name is None else str(name).replace("\n", "\\n")


def _line(start: str, meaning: str) -> Iterator[str]:
    """``start``, and ``meaning`` in a column of its own; below, where ``start`` is too long."""
    text = textwrap.wrap(for_terminal(meaning), _width() - _LONGEST_VALUE - 2)
    first, *rest = text if len(start) <= _LONGEST_VALUE else ["", *text]
    yield f"{for_terminal(start):<{_LONGEST_VALUE}}  {first}".rstrip()
    yield from (f"{'':<{_LONGEST_VALUE}}  {line}" for line in rest)


def explain_key(field: "dataclasses.Field[Any]") -> str:
    """The meaning of a field, its unit, and the words that it takes."""
    unit, words = unit_of(field), [name for kind in kinds(field.type) for name in choices(kind)]
    details = [", ".join(words), unit if unit is not None and unit not in meaning_of(field) else ""]
    shown = "; ".join(detail for detail in details if detail)
    return f"{meaning_of(field)} ({shown})" if shown else meaning_of(field)


def choices(kind: Any) -> list[str]:
    """The words of an enumeration; of another type none."""
    return list(kind.__members__) if isinstance(kind, type) and issubclass(kind, Enum) else []


def by_size(name: str) -> tuple[str, int]:
    """A key that puts llama_60m before llama_130m, and that before llama_1b."""
    sized = re.fullmatch(r"(.+_)(\d+)([mb])", name)
    return (sized[1], int(sized[2]) * (1000 if sized[3] == "b" else 1)) if sized else (name, 0)


def skip_hydras_list_of_groups() -> None:
    """Hydra lists all groups for every ``--help``, which takes a second; ours shows ``list_groups``."""
    from hydra._internal.hydra import Hydra

    Hydra.format_config_groups = lambda *_, **__: ""  # type: ignore[method-assign]
