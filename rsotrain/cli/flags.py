"""The flags of the command line, which are Hydra's: they come first, and there are no others."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from rsotrain.cli.hints import other_tools_name
from rsotrain.config.keys import known_keys
from rsotrain.errors import UserError, require

_COMPLETION = 'eval "$(rsotrain --shell-completion install=bash)" (or zsh, fish) installs it'
_WITHOUT_VALUE = {"--shell-completion": _COMPLETION, "-sc": _COMPLETION}


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides, which argparse wants in one piece: ``mode=plan -m seed=0,1``.

    Raises UserError for a flag that does not exist, lacks its value, or has no effect.
    """
    for flag, advice in _WITHOUT_VALUE.items():
        if flag in arguments[-1:]:
            raise UserError(f"{flag} needs to know what to do; {advice}")
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(list(arguments))
    require(
        given.experimental_rerun is None,
        "--experimental-rerun would unpickle a file, which can run any code; give the run's command again",
    )
    for name in ("package", "resolve"):
        require(
            not getattr(given, name) or given.cfg is not None, f"--{name} has no effect without --cfg job"
        )
    overrides = list(given.overrides)
    flags = []
    for argument in arguments:
        if overrides and argument == overrides[0]:
            overrides.pop(0)
        else:
            flags.append(argument)
    if flags and flags[-1] in ("--info", "-i"):  # an override would be taken for its value
        flags[-1] = f"--info={given.info}"
    return flags, given.overrides


def config_dir(arguments: Sequence[str]) -> Path | None:
    """The folder of ``--config-dir``, which adds options to the groups, in what ``split_flags`` has taken."""
    given, _ = get_args_parser().parse_known_args(list(arguments))
    return None if given.config_dir is None else Path(given.config_dir)


def as_multirun(flags: Sequence[str]) -> list[str]:
    """``flags`` with that of a multirun, unless they ask for help, say, or for something else than runs."""
    given = get_args_parser().parse_args(list(flags))
    others = (given.help, given.hydra_help, given.cfg, given.info, given.shell_completion, given.run)
    return list(flags) if given.multirun or any(others) else [*flags, "--multirun"]


def _refuse(message: str) -> NoReturn:
    unrecognized = re.match(r"unrecognized arguments: --([\w.-]+)", message)
    if unrecognized:
        name = unrecognized[1].replace("-", "_")
        key = next((k for k in (name, unrecognized[1]) if k in known_keys()), None)
        hint = f"; say {key}=…" if key else other_tools_name(name, known_keys())
        if hint:
            raise UserError(f"--{unrecognized[1]} is no flag: settings are written as key=value{hint}")
    raise UserError(f"{message}; rsotrain --hydra-help lists the flags")
