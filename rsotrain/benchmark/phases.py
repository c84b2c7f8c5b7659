"""A training step in phases: which part of the Trainer's own code is running, and for how long.

The ordinary step knows nothing of this: methods of one Trainer are wrapped, and stay so.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rsotrain.benchmark import BACKWARD, DATA, FORWARD, OPTIMIZER, OTHER, PHASES, REFRESH
from rsotrain.parallel import exchange
from rsotrain.training.refreshes import groups_with_bases
from rsotrain.training.trainer import Trainer


class PhaseClock:
    """Seconds of each phase of a step.

    On CUDA the marks between phases are events in the stream: the host neither waits nor is waited for
    within a step, and a phase in which the device waits for the host counts that, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phase = OTHER
        self._marks: list[tuple[str, Any]] = []  # a phase, and when it began

    def enter(self, phase: str) -> None:
        self._phase = phase
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def timed(self, function: Callable, inside: str, after: str | None = None) -> Callable:
        """``function`` in the phase ``inside``; then comes ``after``, or the phase that there was before."""

        def wrapped(*args: Any, **keywords: Any) -> Any:
            before = self._phase
            self.enter(inside)
            with torch.profiler.record_function(f"phase:{inside}"):
                result = function(*args, **keywords)
            self.enter(after or before)
            return result

        return wrapped

    def step(self, function: Callable[[], object]) -> dict[str, float]:
        """Seconds of each phase of one call of ``function``, waiting for the device at its end."""
        self._marks.clear()
        self.enter(OTHER)
        function()
        self.enter(OTHER)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += (
                begun.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - begun
            )
        return seconds


def attach(clock: PhaseClock, trainer: Trainer) -> None:
    """Have ``clock`` follow the steps of ``trainer``.

    ``forward`` has the gradients of the head in it, which are computed with the loss. ``optimizer`` is the
    update with the sum over ranks of what backward leaves to it; ``refresh`` all that a step does more
    because bases change; ``other`` the gradient norm, clipping, the finite check and the schedule.
    """
    wraps: list[tuple[Any, str, str, str | None]] = [
        (trainer, "micro_batches", DATA, None),
        (trainer, "forward", FORWARD, BACKWARD),
        (trainer.optimizer, "reduce_gradients", OPTIMIZER, OTHER),
        (trainer.optimizer, "step", OPTIMIZER, OTHER),
    ]
    if trainer.optimizer.in_backward is not None:
        wraps.append((trainer.optimizer.in_backward, "update", OPTIMIZER, None))
    for group in groups_with_bases(trainer):
        wraps += [(owner, name, REFRESH, None) for owner, name in group.refresh_work()]
    for owner, name, inside, after in wraps:
        wrapped = clock.timed(getattr(owner, name), inside, after)
        if name == "observe" and trainer.config.compile:  # called from within compiled blocks
            wrapped = torch.compiler.disable(wrapped)
        setattr(owner, name, wrapped)


def communication_seconds(profile: torch.profiler.profile, num_steps: int) -> float:
    """Seconds of a step in which collectives were under way, from a profile of ``num_steps`` steps.

    With gloo from their start to their end, so that waiting for other ranks counts, but of the pieces that
    ``exchange`` sends while this rank computes only the waiting; with NCCL its kernels'.
    """
    intervals: dict[bool, list[tuple[float, float]]] = defaultdict(list)
    for event in profile.events() or ():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        # a send lasts, as gloo counts, until it is waited for
        by_gloo = event.name.startswith("gloo:") and event.name not in ("gloo:send", "gloo:recv")
        if ("nccl" in event.name and on_device) or by_gloo or event.name == exchange.WAITING:
            intervals[on_device].append((event.time_range.start, event.time_range.end))
    return covered(intervals[True] + intervals[False]) / 1e6 / num_steps


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of ``intervals``."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
