"""Background iterators: items in order, and no process that outlives its parent or holds it up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsotrain.data.background import BackgroundIterator
from rsotrain.errors import TrainingError

PROMPT_SECONDS = 10.0  # far more than it takes, far less than for ever


class Stuck:
    """Its process's id, twice, and then nothing more, as from a file system that does not answer."""

    def __iter__(self) -> Iterator[int]:
        yield os.getpid()
        yield os.getpid()
        while True:
            time.sleep(60)


class Counted:
    """0, 1, 2 …, each with more bytes than a pipe holds, and noted in a file when it is made."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for number in range(100):
            with self.file.open("a") as file:
                file.write(f"{number}\n")
            yield number, bytes(2**18)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    last = time.monotonic() + PROMPT_SECONDS
    while runs(pid) and time.monotonic() < last:
        time.sleep(0.05)
    return not runs(pid)


def test_items_come_in_order_and_only_so_many_are_made_ahead(tmp_path: Path) -> None:
    file = tmp_path / "made"
    items = BackgroundIterator(Counted(file), ahead=3)
    assert [next(items)[0] for _ in range(5)] == list(range(5))
    time.sleep(0.3)
    # 5 taken, one on its way, 3 waiting, one that finds no room
    assert len(file.read_text().splitlines()) <= 10
    items.close()
    items.close()  # again is nothing


def test_close_does_not_wait_for_a_process_that_is_stuck() -> None:
    items = BackgroundIterator(Stuck(), ahead=2)
    pid = next(items)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, number)  # as to all processes of a job: not for this one to act on
    assert next(items) == pid
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < PROMPT_SECONDS / 2
    assert not runs(pid)


def test_a_process_that_dies_is_one_sentence() -> None:
    items = BackgroundIterator(Stuck(), ahead=2)
    pid = next(items)
    assert next(items) == pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"background process .* has ended \(exit status -9"):
        next(items)
    items.close()


@pytest.mark.parametrize("end", ["killed", "exits"])
def test_no_process_outlives_its_parent_or_holds_it_up(end: str) -> None:
    lines = [
        "from rsotrain.data import background",
        "background.SERVER_MODULE = 'queue'",  # no torch in the fork server
        "from test_background import Stuck",
        "items = background.BackgroundIterator(Stuck(), ahead=2)",
        "print(next(items), flush=True)",
        "input()",
    ]
    tests = Path(__file__).parent
    parent = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parents[1]}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert runs(pid)
    if end == "killed":
        parent.kill()
    else:
        parent.stdin.write("\n")
        parent.stdin.flush()
    try:
        parent.wait(timeout=PROMPT_SECONDS)
        assert ends(pid)
    finally:
        parent.kill()
        if runs(pid):
            os.kill(pid, signal.SIGKILL)
