"""Looking at runs again and again while they go on."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsotrain.errors import UserError
from rsotrain.report.runs import Run, Tell, folders_in, has_metrics, read_object, read_runs, state_of
from rsotrain.tracking.escaping import one_line, print_line
from rsotrain.tracking.run_files import RUN_RECORD, RunState


class Told:
    """Receives sentences: prints each once, and keeps those of the present look for the report."""

    def __init__(self, program: str = "rsotrain-report") -> None:
        self._program = program
        self._said: set[str] = set()
        self._present: list[str] = []

    def __call__(self, sentence: str) -> None:
        if sentence not in self._said:
            print_line(f"{self._program}: {one_line(sentence)}", sys.stderr)
        self._said.add(sentence)
        self._present.append(sentence)

    def take(self) -> list[str]:
        """What has been told since the last call."""
        present, self._present = self._present, []
        return present


def looks(paths: Sequence[Path], every: float, tell: Tell | None = None) -> Iterator[tuple[list[Run], bool]]:
    """The runs in ``paths`` and whether to look again, each ``every`` seconds, until none of them goes on.

    Between two members of a sweep nothing runs for a moment, and a run has no metrics before its first
    step: the end is believed when it is seen twice. ``tell`` is told what is left out, and what went wrong
    in a look that was not the last. Raises UserError where the first look, or the last, sees no run.
    """
    went = False
    while True:
        starting = _is_starting(paths)
        try:
            runs = read_runs(paths, tell)
        except UserError as error:  # a folder that is being moved, say
            if not (went or starting):
                raise
            if tell is not None:
                tell(WAITING if starting else str(error))
            went = starting
        else:
            goes = starting or any(run.state is RunState.running for run in runs)
            yield runs, goes or went
            if not (goes or went):
                return
            went = goes
        time.sleep(every)


WAITING = "a run has begun, and none has got to its first step; waiting"


def _is_starting(paths: Sequence[Path]) -> bool:
    """Whether a run in ``paths`` has begun and not got to its first step."""
    try:
        outer = [path.expanduser() for path in paths]
        folders = [folder for path in outer if path.is_dir() for folder in (path, *folders_in(path))]
    except (OSError, RuntimeError, UserError):  # of which reading the runs will speak
        return False
    records = [f / RUN_RECORD for f in folders if os.path.isfile(f / RUN_RECORD) and not has_metrics(f)]
    return any(state_of(read_object(record), {}, record) is RunState.running for record in records)
