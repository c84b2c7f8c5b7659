"""Requests to stop: a signal, or a time budget that is spent. The step that runs is finished first."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rsotrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# The terminal has gone; `nohup` has it ignored, and so it stays.
HANG_UP = signal.SIGHUP
# submitit warns with this one. It is left alone, and ends the process, where nobody else handles it.
FOREIGN = signal.SIGUSR2
# By these a scheduler says that it takes the machine away; SIGTERM may as well end a run for good.
SCHEDULERS_WARNINGS = (signal.SIGUSR1, FOREIGN)


class Reason(str):
    """Why training stops, in words; ``signalled``: by a signal, not by the time budget."""

    signalled = False


def _next_interrupt() -> None:
    """Have a second SIGINT end the process at once, whatever it waits for: a collective, a checkpoint, W&B.

    Not under torchrun, which passes on what the terminal has sent to its processes already, and after half a
    minute ends them itself.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    signal.signal(signal.SIGINT, signal.SIG_IGN if launched else signal.SIG_DFL)


class StopRequest:
    """``reason()`` is None until training should stop. A SIGINT after that is as ``_next_interrupt`` says."""

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._signal: signal.Signals | None = None

    @property
    def signal(self) -> signal.Signals | None:
        """The first that came."""
        return self._signal

    def reason(self) -> Reason | None:
        if self._signal is not None:
            reason = Reason(self._signal.name)
            reason.signalled = True
            return reason
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return Reason(f"max_seconds={self._max_seconds:g}")
        return None

    def signals(self) -> tuple[float, float]:
        """(1 if asked to stop, 1 if by a signal), to be summed over ranks."""
        reason = self.reason()
        return float(reason is not None), float(reason is not None and reason.signalled)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
        _next_interrupt()

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals over inside the block, which must be entered on the main thread."""
        foreign = [FOREIGN] if callable(signal.getsignal(FOREIGN)) else []
        hang_up = [HANG_UP] if signal.getsignal(HANG_UP) is not signal.SIG_IGN else []
        numbers = [*SIGNALS, *hang_up, *foreign]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Outside of training SIGUSR1 and SIGINT end the process, to be started again: nothing is unsaved.

    By Interrupted and KeyboardInterrupt, so that what is half-written goes.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"rsotrain: stopped by SIGUSR1 outside of training; the same command starts again\n")
        raise Interrupted(number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        _next_interrupt()
        raise KeyboardInterrupt

    handlers = {signal.SIGUSR1: leave, signal.SIGINT: interrupt}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background of a shell's script
        del handlers[signal.SIGINT]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if number != signal.SIGINT or signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


def agreed_reason(stop: StopRequest, signals: tuple[float, ...]) -> Reason | None:
    """The reason that all ranks have, given the sums over them of ``StopRequest.signals``."""
    asked, signalled = signals
    if not asked:
        return None
    reason = stop.reason() or Reason("a request to another rank")
    reason.signalled = bool(signalled)
    return reason
