"""Requests to stop: a signal, or a time budget that is spent. The step that runs is finished first."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Reason(str):
    """Why training stops, in words; ``signalled``: by a signal, not by the time budget."""

    signalled = False


class StopRequest:
    """``reason()`` is None until training should stop. A second SIGINT ends the process at once."""

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._signal: str | None = None

    def reason(self) -> Reason | None:
        if self._signal is not None:
            reason = Reason(self._signal)
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
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take the signals over inside the block, which must be entered on the main thread."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def agreed_reason(stop: StopRequest, signals: tuple[float, ...]) -> Reason | None:
    """The reason that all ranks have, given the sums over them of ``StopRequest.signals``."""
    asked, signalled = signals
    if not asked:
        return None
    reason = stop.reason() or Reason("a request to another rank")
    reason.signalled = bool(signalled)
    return reason
