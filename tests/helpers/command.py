"""The command ``rsotrain``, in a process of its own (the fixture ``cli``) or in this one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., subprocess.CompletedProcess[str]]


def call_main(cli: object, arguments: list[str]) -> int:
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    before = sys.argv
    sys.argv = ["rsotrain", *arguments]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()  # type: ignore[attr-defined]
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return int(stopped.value.code or 0)
