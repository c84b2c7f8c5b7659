"""Text of the configuration: what can be written at all, what names a file, what names a folder of ours."""

import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from rsotrain.errors import UserError, require

NAME_BYTES = 255  # what a file system takes for one name
PATH_BYTES = 3500  # what it takes for a whole path, less what lies inside a run's folder

_PATH = "path"  # in a field's metadata


def file_path(default: str | None = MISSING) -> Any:
    """A dataclass field for the path of a file or folder, or for none."""
    return dataclasses.field(default=default, metadata={_PATH: True})


def is_path(field: "dataclasses.Field[Any]") -> bool:
    return _PATH in field.metadata


def check_text(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first text of ``config`` that cannot be written, and for paths that none has.

    ``prefix``: what stands before a field's name in the sentence, such as ``model.``.
    """
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_text(value, f"{key}.")
            continue
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, Mapping) and _of_mappings(field):
                for word in _texts(text):
                    check_writable(key, word)
                continue
            # OmegaConf looks at the type of an element, but not into one that is a list
            require(
                not isinstance(text, list | tuple | dict), f"{key}={value} must be a list of plain values"
            )
            if isinstance(text, str):
                (check_path if is_path(field) else check_writable)(key, text)


def _of_mappings(field: "dataclasses.Field[Any]") -> bool:
    return any(typing.get_origin(item) is dict for item in typing.get_args(field.type))


def _texts(value: Any) -> Iterator[str]:
    """All text in nested mappings and lists, their keys too."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def check_writable(key: str, text: str) -> None:
    """Raise UserError for text with a NUL character, which no path can have, or that is not UTF-8."""
    require("\0" not in text, f"{key}={text} contains a NUL character; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key}={text} is not valid UTF-8; rename what it stands for") from error


def check_name(key: str, name: str) -> None:
    """Raise UserError unless ``name`` can be that of one folder, or a part of it."""
    check_writable(key, name)
    require(
        name.strip() not in ("", ".", "..") and Path(name).name == name,
        f"{key}={name} must be the name of one folder, without a slash",
    )
    require(
        not any(ord(character) < 32 or ord(character) == 127 for character in name),
        f"{key}={name} contains a control character; leave it out",
    )
    size = len(name.encode())
    require(
        size <= NAME_BYTES,
        f"{key}={name} has {size} bytes, but the name of a folder at most {NAME_BYTES}; shorten it",
    )


def check_path(key: str, text: str) -> None:
    """Raise UserError for the path of a file or folder that no file system has."""
    check_writable(key, text)
    require(text.strip() != "", f"{key} is empty; give a path, or . for the folder that you are in")
    try:
        parts = Path(text).expanduser().parts
    except RuntimeError as error:  # ~somebody
        raise UserError(f"{key}={text}: there is no home folder of this name") from error
    longest = max((len(part.encode()) for part in parts), default=0)  # of ".": there are none
    require(
        longest <= NAME_BYTES,
        f"{key}={text} has a name of {longest} bytes in it, but a file's may have {NAME_BYTES}; shorten it",
    )
    size = len(text.encode())
    require(size <= PATH_BYTES, f"{key}={text} has {size} bytes, but may have {PATH_BYTES}; shorten it")


def check_folder(key: str, text: str, *, writable: bool = True) -> None:
    """Raise UserError where a folder cannot be, or not be made or written to."""
    existing = folder = Path(text).expanduser()
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    require(os.path.isdir(existing), f"{key}={folder}: {existing} is not a folder")
    may = not writable or os.access(existing, os.W_OK | os.X_OK)
    require(may, f"{key}={folder}: {existing} is not writable")
