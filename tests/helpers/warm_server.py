"""A process that has imported what the command imports, and forks for each call: see ``warm.py``.

Each line of its standard input is a call, as JSON with ``arguments``, ``folder``, ``environment``, and the
files ``out`` and ``err``. It answers with two lines: the number of the process, and its exit status as
``os.waitstatus_to_exitcode`` has it.
"""

import json
import os
import random
import runpy
import sys
from importlib import import_module
from typing import Any

LOADED = ("cli.entry", "cli.dispatch", "running.mode", "planner.mode", "inference.modes")


def become(call: dict[str, Any]) -> None:
    """Have the surroundings that ``python -m rsotrain`` would have been started with."""
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.path[0] = call["folder"]
    sys.argv[1:] = call["arguments"]
    nothing = os.open(os.devnull, os.O_RDONLY)
    files = [os.open(call[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for name in ("out", "err")]
    for number, file in enumerate([nothing, *files]):
        os.dup2(file, number)
        os.close(file)
    random.seed()


def serve() -> dict[str, Any]:
    """Answer calls; returns, with what was called, in each forked process alone."""
    calls, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in calls:
        process = os.fork()
        if process == 0:
            calls.close()
            answers.close()
            return json.loads(line)  # type: ignore[no-any-return]
        print(process, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)
    sys.exit(0)


for module in LOADED:
    import_module(f"rsotrain.{module}")
become(serve())
runpy.run_module("rsotrain", run_name="__main__", alter_sys=True)
