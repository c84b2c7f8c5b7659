"""The screen may go away while a run is at work: nothing that is written to it may end the training."""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


def survive_its_loss() -> None:
    """From now on nothing that is printed raises, whoever prints it, until the process ends.

    A closed terminal, a pipe that nobody reads, a full disk behind ``>``, ``>&-``: the first error sends the
    rest nowhere, the interpreter's last flush included. A character that the terminal does not know is
    replaced.
    """
    for descriptor in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as Python finds a closed descriptor; by now that may be another file
            stream = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))


def silence(stream: TextIO) -> None:
    """Send what is still written to ``stream``, and what waits in its buffer, nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)
    with suppress(OSError, ValueError):
        stream.flush()


class _Lasting:
    """A text stream whose ``write`` and ``flush`` never fail; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it has been closed
            self._lose()
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        try:
            silence(self._stream)
        except (OSError, ValueError, io.UnsupportedOperation):  # it has no descriptor any more
            self._stream = open(os.devnull, "w")  # noqa: SIM115
