"""An iteration in a process of its own, some items ahead, that neither outlives this process nor holds it up.

Not ``torch.utils.data.DataLoader``: its workers notice only the death of the process that forked them, which
is the fork server here and waits for them in turn, so they would run for ever after a SIGKILL of the trainer;
and it ends them with SIGTERM, which they must ignore, and then waits.
"""

import multiprocessing
import multiprocessing.util
import os
import queue
import signal
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from rsotrain.errors import TrainingError

SERVER_MODULE = "rsotrain.data.streaming"  # what the fork server imports once for all


class BackgroundIterator:
    """The items of ``source``, which is pickled, as another process yields them.

    That process works at most ``ahead`` items ahead, and is killed by ``close`` or at the latest when this
    one ends, however that happens: it must have nothing to put in order.
    """

    def __init__(self, source: Iterable[Any], ahead: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([SERVER_MODULE])
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_supply, args=(source, ahead, sender), daemon=True)
        self._process.start()
        sender.close()  # the process has the only one left, so that its end is seen here
        # Before multiprocessing, at the exit of this process, waits for its children.
        self._end = multiprocessing.util.Finalize(
            self, _kill, args=(self._process, self._receiver), exitpriority=10
        )

    def __next__(self) -> Any:
        """The next item. Raises TrainingError when the process has ended."""
        try:
            return self._receiver.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise TrainingError(
                f"a background process that reads the data has ended (exit status {self._process.exitcode};"
                " -9 is what a machine short of memory does);"
                " the same command goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        self._end()


def _kill(process: ForkServerProcess, receiver: Connection) -> None:
    process.kill()
    process.join()
    receiver.close()


def _supply(source: Iterable[Any], ahead: int, sender: Connection) -> None:
    """The life of the process: one thread iterates, one sends, one waits for the end of the trainer."""
    # A signal to the whole job is the trainer's affair: it still needs batches to finish its step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    items: queue.Queue[Any] = queue.Queue(ahead)

    def send() -> None:
        try:
            while True:
                sender.send(items.get())
                items.task_done()
        finally:  # nobody listens any more
            os._exit(1)

    threading.Thread(target=send, daemon=True).start()
    for item in source:
        items.put(item)
    items.join()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
