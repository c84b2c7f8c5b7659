"""Checkpoints written in the background, from a copy, while training goes on."""

import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rsotrain.checkpoints.files import KINDS, Tensors, check_finite, save_checkpoint, score_checkpoint
from rsotrain.errors import NonFiniteError
from rsotrain.files import reason
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import Shard

# For a checkpoint that is being written when training fails on one of several ranks.
_LAST_SECONDS = 20.0


@dataclass(frozen=True)
class _Evaluation:
    step: int
    loss: float
    run: Mapping[str, Any]


class BackgroundSaver:
    """One checkpoint at a time. All ranks call its methods together, with their pieces.

    ``start`` copies the tensors to CPU memory, which is all that training waits for. From a GPU it only
    begins to, and before the next update ``let_copies_end`` has to be called. ``check`` is called on rank 0
    before anything is written, and what it raises is raised by ``wait``; ``warn`` is told of an evaluation
    that could not be added, possibly from the thread.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int,
        *,
        check: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.begun: int | None = None  # the last step that was
        self._check, self._warn = check, warn
        self._running: tuple[int, futures.Future[Path], threading.Thread] | None = None
        self._copied: torch.cuda.Event | None = None
        self._lock = threading.Lock()  # for the two that follow
        self._writing = False
        self._evaluation: _Evaluation | None = None

    def start(
        self, step: int, tensors: Mapping[str, Tensors], shards: Mapping[str, Shard], record: dict[str, Any]
    ) -> None:
        """Begin to write; what was begun before must have been waited for."""
        assert self._running is None
        self.begun, self._writing = step, True
        staged, self._copied = staged_on_host({kind: tensors[kind] for kind in KINDS}, self.world.device)
        future: futures.Future[Path] = futures.Future()
        # a daemon: it may wait for a rank that never answers, and must not keep the process from ending
        thread = threading.Thread(
            target=self._write,
            # the tensors, too: theirs is the memory that is read from until the copies are made
            args=(future, step, staged, self._copied, tensors, shards, record),
            name="checkpoint",
            daemon=True,
        )
        thread.start()
        self._running = step, future, thread

    def _write(
        self,
        future: futures.Future[Path],
        step: int,
        tensors: Mapping[str, Tensors],
        copied: torch.cuda.Event | None,
        _originals: Mapping[str, Tensors],
        shards: Mapping[str, Shard],
        record: dict[str, Any],
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            with self.world.reporting_losses():
                self.world.main_together(self._check)
                self.world.together(lambda: _check(step, tensors))
                written = save_checkpoint(
                    self.folder, step, tensors, record, keep=self.keep, shards=shards, world=self.world
                )
            self._end_writing()
        except SafetensorError as error:  # its word for a full disk
            future.set_exception(OSError(str(error)))
        except BaseException as error:  # for ``wait`` to raise
            future.set_exception(error)
        else:
            future.set_result(written)

    def let_copies_end(self) -> None:
        """Have the device make no update before it has made the copies; the host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self.world.device).wait_event(self._copied)
            self._copied = None

    def score(self, step: int, loss: float, run: Mapping[str, Any]) -> None:
        """Add the evaluation of ``step``, the newest checkpoint's, as soon as that is whole.

        Rank 0 alone writes it. ``run``: what the run's own record says from now on.
        """
        evaluation = _Evaluation(step, loss, run)
        with self._lock:
            if self._writing:
                self._evaluation = evaluation
                return
        self._add(evaluation)

    def _end_writing(self) -> None:
        with self._lock:
            self._writing, evaluation, self._evaluation = False, self._evaluation, None
        if evaluation is not None:
            self._add(evaluation)

    def _add(self, evaluation: _Evaluation) -> None:
        if not self.world.is_main:
            return
        try:
            score_checkpoint(self.folder, evaluation.step, evaluation.loss, evaluation.run, keep=self.keep)
        except OSError as error:
            self._warn(f"warning: the evaluation of step {evaluation.step} was not recorded: {reason(error)}")

    def wait(self) -> tuple[int, OSError] | None:
        """Until all is written; the step and the error of a checkpoint that could not be.

        Raises whatever else went wrong.
        """
        if self._running is None:
            return None
        (step, future, thread), self._running = self._running, None
        # asking again and again: writing may take long, but a rank that does not answer is lost
        while True:
            futures.wait([future], timeout=1.0)
            if self.world.sum([not future.done()]) == [0.0]:
                break
        _join(future, thread)
        try:
            future.result()
        except OSError as error:
            return step, error
        return None

    def close(self) -> None:
        """Let what runs end, whatever comes of it; with several ranks not for long: one may be lost."""
        if self._running is not None:
            _, future, thread = self._running
            futures.wait([future], None if self.world.size == 1 else _LAST_SECONDS)
            _join(future, thread)


def _join(future: futures.Future[Path], thread: threading.Thread) -> None:
    """Let a thread that has written free its tensors, too: the process must not end meanwhile.

    Python kills daemon threads at its end by unwinding them, which in torch's code aborts the process.
    """
    if future.done():
        thread.join()


def _check(step: int, tensors: Mapping[str, Tensors]) -> None:
    try:
        check_finite(tensors)
    except NonFiniteError as error:
        raise NonFiniteError(f"step {step}: {error}, so no checkpoint of it is kept") from error


def staged_on_host(
    tensors: Mapping[str, Tensors], device: torch.device
) -> tuple[dict[str, dict[str, torch.Tensor]], "torch.cuda.Event | None"]:
    """Copies on the host, and what happens when they are made; None: they are.

    From a GPU they are made to pinned memory in a stream of their own, beside the passes of the next step.
    """
    if device.type != "cuda":
        return {kind: {n: copied_to_host(t) for n, t in of.items()} for kind, of in tensors.items()}, None
    stream, copied = torch.cuda.Stream(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))  # all that has been asked for until now
    with torch.cuda.stream(stream):
        staged = {kind: {n: _pinned_copy(t) for n, t in of.items()} for kind, of in tensors.items()}
        copied.record(stream)
    return staged, copied


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return copied_to_host(tensor)
    # torch keeps pinned memory for the next checkpoint
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)


def copied_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
