"""The real training step with fake tensors: one rank of a run, without its memory.

Trainer, model, optimizer and FSDP are the real ones. Only the data are placeholders, and the process group
has the planned size but sends nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rsotrain.config.data import Packing, TrainedTokenizerConfig
from rsotrain.config.schema import Config
from rsotrain.data.build import Data
from rsotrain.data.build_tokenizer import read_tokenizer
from rsotrain.data.order import FileOrder
from rsotrain.instruments.devices import planning_for
from rsotrain.instruments.memory import saved_activation_bytes
from rsotrain.instruments.phases import Phase, Watcher, watching
from rsotrain.instruments.work import WorkCounter
from rsotrain.models.documents import Documents
from rsotrain.parallel.ranks import World, build_mesh, destroy_groups
from rsotrain.planner.tracker import CUDA_BLOCK_BYTES, Kind, MemoryTracker
from rsotrain.training.model import model_without_memory
from rsotrain.training.refreshes import all_bases_due
from rsotrain.training.trainer import Trainer

_CPU = torch.device("cpu")
_TOKENS_OF_DOCUMENT = 256


class _Answers(TorchDispatchMode):
    """Returns values where code reads a fake tensor's value.

    All are 1: a loss is finite, a condition holds, a batch has tokens.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


class _PassesDone(Exception):  # noqa: N818 (it is no error)
    """Ends a step before the optimizer's step."""


class _Tokenizer:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eos_id = 0


class _Sequences:
    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def order(self, seed: int) -> FileOrder:
        return FileOrder(None)

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        return tokens, tokens.clone()


class _Data:
    """The attributes of ``Data`` that a Trainer needs for a step."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.tokenizer = _Tokenizer(vocab_size)
        self.train = _Sequences(seq_len)


class _FakeTrainer(Trainer):
    def valid_mask(self, targets: torch.Tensor) -> torch.Tensor | None:
        """Without data, assume that a sequence is padded wherever the packing allows it."""
        padded = self.config.data.packing is Packing.padded
        return torch.ones_like(targets, dtype=torch.bool) if padded else None

    def documents(self, inputs: torch.Tensor) -> Documents | None:
        """Without data, as many as there may be of some hundred tokens; memory does not depend on it."""
        if not self.model.model.takes_documents(self.device):
            return None
        number = -(-inputs.numel() // _TOKENS_OF_DOCUMENT)
        starts = torch.zeros(number + 1, dtype=torch.int32, device=self.device)
        return Documents(starts, inputs.shape[1])


def tokenizer_size(config: Config) -> int:
    """Vocabulary size of the run's tokenizer, without training one; UserError where its file is missing."""
    given = config.tokenizer
    if isinstance(given, TrainedTokenizerConfig):
        return given.vocab_size
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    return read_tokenizer(given).vocab_size


def with_micro_batches(config: Config, size: int | None = None) -> Config:
    """``config`` with at most two micro-batches in a step, of ``size`` sequences or of the run's own size."""
    of_rank = config.batch_size // world_size(config)
    micro = config.micro_batch_size or of_rank
    number = min(2, of_rank // micro)
    size = size or micro
    return replace(config, batch_size=number * size * world_size(config), micro_batch_size=size)


def world_size(config: Config) -> int:
    return config.parallelism.world_size or 1


@contextmanager
def fake_world(config: Config, device: torch.device = _CPU) -> Iterator[World]:
    """Rank 0 of ``parallelism.world_size`` ranks, on ``device``; the other ranks do not exist.

    Rank 0 has the largest pieces of all tensors. The process must not be a rank of a run.
    """
    size = world_size(config)
    if size == 1:
        yield World(device)
        return
    from torch.distributed._tools import fake_collectives  # noqa: F401 (lets fake tensors through collectives)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a rank of a run cannot pretend to be another"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        mesh = build_mesh(config.parallelism, device.type)
        cpu_mesh = mesh if device == _CPU else build_mesh(config.parallelism, "cpu")
        yield World(device, rank=0, size=size, mesh=mesh, cpu_mesh=cpu_mesh)
    finally:
        destroy_groups()


class FakeRun:
    """A context manager with a Trainer whose tensors are fake. ``kind``: the kind of device to plan for.

    Micro-batches after the second do not change the peak, so a step has at most two. The fake tensors are on
    ``device``: torch carries those of a kind of device only where it was built for it.
    """

    def __init__(self, config: Config, kind: str, device: torch.device = _CPU) -> None:
        self.config = config
        self.kind = kind
        self._device = device
        self._stack = ExitStack()

    def __enter__(self) -> "FakeRun":
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _build(self) -> None:
        # the plan does not cover compiled code, and the values of the initial weights do not matter
        config = replace(self.config, compile=False, model=replace(self.config.model, init_from=None))
        config = with_micro_batches(config)
        world = self._stack.enter_context(fake_world(config, self._device))
        data = cast(Data, _Data(tokenizer_size(config), config.seq_len))
        model = model_without_memory(config, data.tokenizer)  # not fake: fake tensors cannot leave "meta"
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.faking():
            self.trainer = _FakeTrainer(config, data, world, model)
        self.saved_activations_bytes = 0
        self.gradients_bytes = self.block_gradients_bytes = 0

    def use_micro_batch(self, size: int) -> None:
        """Use micro-batches of ``size`` sequences from now on."""
        self.trainer.config = with_micro_batches(self.trainer.config, size)

    @contextmanager
    def faking(self) -> Iterator[None]:
        """What is done inside is done with fake tensors."""
        with self._fake, _Answers(), planning_for(self.kind):
            yield

    def go_to(self, number: int) -> None:
        """Let the next step be step ``number`` (1-based)."""
        trainer = self.trainer
        trainer.step = trainer.optimizer.steps_done = number - 1
        if number > 1:
            for group in trainer.optimizer.groups:
                group.resume()

    def step(self, number: int, counter: WorkCounter | None = None) -> MemoryTracker:
        """Run step ``number`` (1-based), with the refreshes of that step; return its memory.

        ``counter`` counts what the step asks of the device.
        """
        return self._step(number, counter, whole=True)

    def refreshing_step(self, counter: WorkCounter) -> None:
        """Run a step in which all bases are refreshed, none for the first time, whatever the schedule."""
        with all_bases_due(self.trainer):
            self._step(self.trainer.optimizer.steps_done + 1, counter, whole=True)

    def passes(self, number: int) -> MemoryTracker:
        """The same for the passes alone, without an update that comes after them."""
        return self._step(number, None, whole=False)

    def _step(self, number: int, counter: WorkCounter | None, *, whole: bool) -> MemoryTracker:
        trainer = self.trainer
        tracker = MemoryTracker(CUDA_BLOCK_BYTES if self.kind == "cuda" else 1)
        with self.faking():
            self.go_to(number)
            trainer.saved_activations_bytes = 0  # measured here
            watcher = self._watcher(tracker, counter, whole)
            with tracker, counter or nullcontext(), watching(watcher), suppress(_PassesDone):
                tracker.mark(trainer.model.parameters(), Kind.parameters)
                tracker.mark(trainer.optimizer.state_tensors(), Kind.optimizer_state)
                trainer.train_step()
            trainer.optimizer.zero_grad()
        return tracker

    def _watcher(self, tracker: MemoryTracker, counter: WorkCounter | None, whole: bool) -> Watcher:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        in_backward = optimizer.in_backward is not None

        def keep(tensor: torch.Tensor) -> None:
            tracker.mark([tensor], Kind.activations)

        @contextmanager
        def watch(name: Phase) -> Iterator[None]:
            if name is Phase.optimizer_step and not whole and not in_backward:
                raise _PassesDone
            with tracker.phase(name), counter.phase(name) if counter else nullcontext():
                if name is Phase.optimizer_step and in_backward:
                    tracker.mark(optimizer.partial_gradients(), Kind.gradients)
                if name is Phase.forward:
                    with saved_activation_bytes(trainer.live_tensors(), keep) as saved:
                        yield
                    self.saved_activations_bytes = saved.total
                    return
                yield
                if name is Phase.backward:
                    tracker.mark(optimizer.partial_gradients(), Kind.gradients)
                elif name is Phase.optimizer_step:  # gradients that the optimizer itself has reduced
                    tracker.mark(optimizer.gradients(), Kind.gradients)
                    self.gradients_bytes = optimizer.gradients_bytes()
                    self.block_gradients_bytes = optimizer.block_gradients_bytes()

        return watch
