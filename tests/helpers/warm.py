"""The command in a process of its own that does not import torch anew, which takes as long as a small run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

SERVER = Path(__file__).with_name("warm_server.py")
# What the interpreter or a module reads as it is loaded: another value needs a server of its own.
READ_EARLY = ("PYTHON", "OMP_", "MKL_", "TORCH", "CUDA", "LD_", "HYDRA_FULL_ERROR", "RSOTRAIN_FULL_ERROR")


@cache
def _server(early: tuple[tuple[str, str], ...]) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(READ_EARLY)}
    return subprocess.Popen(
        [sys.executable, SERVER],
        env=environment | dict(early),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_command(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """``python -m rsotrain …`` in ``folder``, forked from a process that is kept for the environment's sake.

    Raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds, when the process has been killed.
    """
    early = tuple(sorted((k, v) for k, v in environment.items() if k.startswith(READ_EARLY)))
    server = _server(early)
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as files:
        out, err = Path(files, "out"), Path(files, "err")
        call = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        server.stdin.write(json.dumps(call | {"out": str(out), "err": str(err)}) + "\n")
        server.stdin.flush()
        process = int(server.stdout.readline())
        too_late = []

        def end() -> None:
            too_late.append(process)
            os.kill(process, signal.SIGKILL)

        alarm = Timer(timeout, end)
        alarm.start()
        status = int(server.stdout.readline())
        alarm.cancel()
        if too_late:
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        return subprocess.CompletedProcess(list(arguments), status, out.read_text(), err.read_text())
