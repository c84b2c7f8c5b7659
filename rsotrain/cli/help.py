"""What ``rsotrain --help`` lists."""

import itertools
import re
import sys
import textwrap
from pathlib import Path

from rsotrain.cli.compose import conf_dir
from rsotrain.tracking.escaping import for_terminal

HELP_WIDTH = 100


def list_groups() -> str:
    """The groups and their options for ``--help``: a group a paragraph, models and recipes by size."""
    folders = [conf_dir()]
    arguments = [part for a in sys.argv for part in (a.split("=", 1) if a.startswith("--") else [a])]
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value))
    options: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    return "\n".join(
        textwrap.fill(
            for_terminal(f"{group}: {', '.join(sorted(names, key=_by_size))}"),
            width=HELP_WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for group, names in sorted(options.items())
    )


def _by_size(name: str) -> tuple[str, int]:
    """A key that puts llama_60m before llama_130m, and that before llama_1b."""
    sized = re.fullmatch(r"(.+_)(\d+)([mb])", name)
    return (sized[1], int(sized[2]) * (1000 if sized[3] == "b" else 1)) if sized else (name, 0)


def skip_hydras_list_of_groups() -> None:
    """Hydra lists all groups for every ``--help``, which takes a second; ours shows ``list_groups``."""
    from hydra._internal.hydra import Hydra

    Hydra.format_config_groups = lambda *_, **__: ""  # type: ignore[method-assign]
