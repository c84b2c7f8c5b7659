"""A file of the group ``tuned``: a method with the rates that were found for it."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rsotrain.files import os_errors_said, write_atomic

ALWAYS = {"optimizer": ("lr", "scale")}  # said even where they are the method's own


def write_tuned(
    path: Path,
    options: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    defaults: Mapping[str, Mapping[str, Any]],
    best: Mapping[str, Any],
    comment: Sequence[str],
) -> Path:
    """Write the file, its folder too. Raises UserError where it cannot be written.

    ``options``: group -> option. ``settings``, ``defaults``: group -> key -> value, of the runs and of the
    options alone; what is equal is left out. ``best``: dotted key -> the value that was found.
    """
    content: dict[str, Any] = {
        "defaults": [*({f"override /{group}": name} for group, name in options.items()), "_self_"]
    }
    for group, values in settings.items():
        own = {
            key: value
            for key, value in values.items()
            if key in ALWAYS.get(group, ()) or value != defaults[group].get(key)
        }
        if own:
            content[group] = own
    for key, value in best.items():
        *groups, last = key.split(".")
        place = content
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    lines = [line for text in comment for line in textwrap.wrap(text, 108, break_on_hyphens=False)]
    head = "".join(f"# {line}\n" for line in ["@package _global_", *lines])
    with os_errors_said(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path
