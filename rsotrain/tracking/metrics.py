"""Measurements of a run: peak memory, throughput, and the JSON files that carry them.

Importing this module does not import torch, so that the command line stays quick.
"""

import ctypes
import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

MAX_LAPS = 4096  # laps kept for the median of a run; beyond it every second one is dropped


def peak_memory_bytes(device: "torch.device | str") -> int:
    """Peak memory of this process in bytes: torch's allocated peak on CUDA, else the resident set's."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def forget_peak_memory(device: "torch.device | str") -> None:
    """Begin the peak anew, so that a run does not report that of an earlier run of this process.

    Nothing happens where the kernel cannot do so.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()  # an earlier run may lie in cycles
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what it freed is still resident
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM; see proc(5)


def peak_resident_bytes() -> int:
    """Peak resident set of this process in bytes."""
    # getrusage's figure survives exec, so a process started by a larger one would report its parent's
    # peak. The kernel's high-water mark belongs to this program alone.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Throughput(NamedTuple):
    """Means over one lap, or medians over a run's laps. Fields are named as in the metrics."""

    tokens_per_second: float
    step_seconds: float

    def metrics(self) -> dict[str, float]:
        return {f"throughput/{name}": value for name, value in self._asdict().items()}


class StepTimer:
    """Throughput of the training steps, without the time that evaluation and saving take.

    ``tick`` ends a step, ``lap`` ends the stretch since the last log. The medians are over laps, not
    steps: on a GPU the host runs ahead, and only where the loss is read do host and device meet.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._laps: list[Throughput] = []
        self._stride = 1  # every stride-th lap is kept
        self._num_laps = 0
        self._start = clock()
        self._tokens = 0
        self._steps = 0

    def tick(self, tokens: int) -> None:
        """One optimizer step over ``tokens`` tokens has ended."""
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time spent inside the ``with`` block."""
        start = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - start

    def lap(self) -> Throughput | None:
        """Throughput since the last lap, and start the next one; None if no step has ended since."""
        now = self._clock()
        steps, tokens, seconds = self._steps, self._tokens, now - self._start
        self._start, self._tokens, self._steps = now, 0, 0
        if steps == 0:
            return None
        lap = Throughput(tokens / seconds if seconds > 0 else math.inf, seconds / steps)
        if self._num_laps % self._stride == 0:
            self._laps.append(lap)
            if len(self._laps) > MAX_LAPS:
                self._laps = self._laps[::2]
                self._stride *= 2
        self._num_laps += 1
        return lap

    def median(self) -> Throughput | None:
        """Median over all laps of this process; None before the first."""
        if not self._laps:
            return None
        return Throughput(*(statistics.median(column) for column in zip(*self._laps, strict=True)))
