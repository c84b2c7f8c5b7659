"""Requests to stop: a signal, or a time budget that is spent. The step that runs is finished first."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """``reason()`` is None until training should stop. A second SIGINT ends the process at once."""

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._signal: str | None = None

    @property
    def signalled(self) -> bool:
        return self._signal is not None

    def reason(self) -> str | None:
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"max_seconds={self._max_seconds:g}"
        return None

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
