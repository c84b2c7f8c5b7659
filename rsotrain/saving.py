"""Checkpoints written in the background, from a copy, while training goes on."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rsotrain.checkpoint import KINDS, Tensors, save_checkpoint
from rsotrain.distributed import World
from rsotrain.sharding import Shard


class BackgroundSaver:
    """One checkpoint at a time. All ranks call its methods together, with their pieces.

    ``start`` copies the tensors to CPU memory, which is all that training waits for.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[Path]] | None = None

    def start(
        self, step: int, tensors: Mapping[str, Tensors], shards: Mapping[str, Shard], record: dict[str, Any]
    ) -> None:
        """Begin to write; what was begun before must have been waited for."""
        assert self._running is None
        staged = {kind: {name: _copied(t) for name, t in tensors[kind].items()} for kind in KINDS}
        self._running = step, self._executor.submit(self._write, step, staged, shards, record)

    def _write(
        self, step: int, tensors: Mapping[str, Tensors], shards: Mapping[str, Shard], record: dict[str, Any]
    ) -> Path:
        try:
            with self.world.reporting_losses():
                return save_checkpoint(
                    self.folder, step, tensors, record, keep=self.keep, shards=shards, world=self.world
                )
        except SafetensorError as error:  # its word for a full disk
            raise OSError(str(error)) from error

    def wait(self) -> tuple[int, OSError] | None:
        """Until all is written; the step and the error of a checkpoint that could not be.

        Raises whatever else went wrong.
        """
        if self._running is None:
            return None
        (step, future), self._running = self._running, None
        try:
            future.result()
        except OSError as error:
            return step, error
        return None

    def close(self) -> None:
        """Let what runs end, whatever comes of it."""
        self._executor.shutdown()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
