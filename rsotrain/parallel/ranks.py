"""The ranks of a run: who they are, how they agree, and what happens when one is lost."""

import atexit
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from rsotrain.config.schema import Device, ParallelismConfig, Strategy
from rsotrain.errors import LostRankError, NonFiniteError, TrainingError, UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")

# What gloo and NCCL say when a peer has gone; gloo raises plain RuntimeErrors. What else NCCL raises, such as
# invalid arguments, an unhandled CUDA error or a lack of memory, is this rank's own.
_LOST = re.compile(
    r"gloo|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|ncclRemoteError|socket"
    r"|communicator was aborted|remote process exited",
    re.IGNORECASE,
)
_PASSED_ON = (UserError, NonFiniteError, TrainingError, OSError)  # the first that fits
# Set-up and saving may take as long as they like on one rank; a rank that dies is noticed all the same.
_PATIENCE = timedelta(days=1)
# That a rank waits, at the end, for those whose last exchange with it may not be over.
_PARTING = timedelta(seconds=60)


def resolve_device(device: Device, local_rank: int = 0) -> torch.device:
    """The device of a process; UserError if there is none of the kind asked for."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device here; use device=cpu or device=auto")
    if device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if 1 < count <= local_rank:  # a launcher may let each process see one GPU, its own
        raise UserError(
            f"process {local_rank + 1} of this node has no GPU of its own, as there are {count};"
            f" start at most {count} processes a node"
        )
    return torch.device("cuda", local_rank % count)


def device_name(device: torch.device, size: int = 1) -> str:
    """In words: what a run of ``size`` processes trains on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"the CPU ({threads} thread{'s' if threads > 1 else ''})"
    return name if size == 1 else f"{size} processes, each with {name}"


@dataclass(frozen=True)
class World:
    """One process among those of a run; by default the only one.

    ``mesh``: of the device, dimension "shard" and, for ddp and hsdp, "replicate" before it; None for a
    single process. ``cpu_mesh``: the same on the CPU. ``patient``: a gloo group of all ranks that waits long.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    mesh: "DeviceMesh | None" = None
    cpu_mesh: "DeviceMesh | None" = None
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float], *, on_device: bool = False) -> list[float]:
        """Elementwise sums over ranks in float64: one small all-reduce."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device if on_device else "cpu")
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, value: Result) -> list[Result]:
        """What each rank has, plain values, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def together(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` on every rank; where it fails on any, all raise what the first of them raised.

        Only the errors that are nobody's programming mistake are passed on, as ``_PASSED_ON`` names them;
        a rank with another error is a lost rank.
        """
        if self.size == 1:
            return action()
        error: Exception | None = None
        try:
            result = action()
        except _PASSED_ON as raised:
            error = raised
        outcomes = self.gathered(None if error is None else (_kind(error), str(error)))
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                if error is not None and rank == self.rank:
                    raise error
                raise _PASSED_ON[outcome[0]](outcome[1]) from error
        return result

    def main_together(self, action: Callable[[], object]) -> None:
        """``action`` on rank 0 while the others wait; where it fails, all raise."""
        self.together(action if self.is_main else lambda: None)

    def in_turn(self, action: Callable[[], Result]) -> Result:
        """``action`` on the first rank of each node, then on the others, which find its files there."""
        if self.size == 1:
            return action()
        first = self.together(action if self.local_rank == 0 else lambda: None)
        rest = self.together(action if self.local_rank != 0 else lambda: None)
        return first if self.local_rank == 0 else rest  # type: ignore[return-value]

    def from_main(self, action: Callable[[], Result]) -> Result:
        """What ``action`` returns on rank 0, on every rank; it must be a plain value."""
        result = self.together(action if self.is_main else lambda: None)
        return self.gathered(result)[0]  # type: ignore[return-value]

    @contextmanager
    def ending_together(self, *orderly: type[BaseException]) -> Iterator[None]:
        """Leave the block, at its end or by one of ``orderly``, when all ranks do.

        An exchange may be over on one rank and not yet on another, which fails if the first one ends. What
        is waited for is therefore counted in the store, beside the connections between ranks.
        """
        try:
            yield
        except orderly:
            _part(self.size)
            raise
        _part(self.size)

    @contextmanager
    def reporting_losses(self) -> Iterator[None]:
        """Turn the loss of another rank into a LostRankError."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and not isinstance(error, TrainingError) and is_loss(error):
                first = str(error).split("\n")[0]
                raise LostRankError(
                    f"rank {self.rank}: another rank has ended or cannot be reached ({first});"
                    " the same command goes on from the last checkpoint"
                ) from error
            raise


def _kind(error: Exception) -> int:
    return next(i for i, kind in enumerate(_PASSED_ON) if isinstance(error, kind))


def is_loss(error: BaseException) -> bool:
    """Does ``error`` say that a peer is gone?"""
    own = isinstance(error, dist.DistBackendError) or not isinstance(error, dist.DistError)
    return not own or _LOST.search(str(error)) is not None


class _Connections:
    """Of this process. ``meetings``: how often ``start`` was called, the same on all ranks."""

    store: dist.Store | None = None
    meetings = 0
    parted = False  # since the last ``start``


def _part(size: int) -> None:
    """Wait until all ranks have come here, and, on the rank that may have the store, until they have gone."""
    store = _Connections.store
    if size == 1 or store is None:
        return
    came, gone = (f"{word}_{_Connections.meetings}" for word in ("came", "gone"))
    with suppress(RuntimeError):  # DistError is one: whoever is missing has said, or will say, why
        if store.add(came, 1) == size:
            store.set(f"all_{came}", "")
        store.wait([f"all_{came}"], _PARTING)
        _Connections.parted = True
        left = store.add(gone, 1)
        deadline = time.monotonic() + _PARTING.total_seconds()
        while dist.get_rank() == 0 and left < size and time.monotonic() < deadline:
            time.sleep(0.01)
            left = store.add(gone, 0)


def disconnect() -> None:
    """Close the connections of ranks that have parted in good order; those of others end with the process.

    The threads that serve them must not outlive Python's interpreter: they would call into it, and abort.
    """
    if _Connections.parted and dist.is_initialized():
        gc.collect()  # models in cycles hold on to their groups
        destroy_groups()
        _Connections.store, _Connections.parted = None, False


def destroy_groups() -> None:
    """Destroy all process groups, and what torch keeps of their meshes.

    DTensor keeps the results of its operations by shape and mesh. The groups of a later world have the same
    names, so its meshes count as equal, and its tensors would be given the mesh of a group that is gone.
    """
    dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def start(parallelism: ParallelismConfig, device: Device) -> World:
    """Join the other ranks, as torchrun's environment variables say; at once if there are none.

    A second call in one process uses the connections of the first. Raises UserError where the number of
    ranks does not suit ``parallelism``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = resolve_device(device, local_rank)
    if size == 1:
        return World(where)
    if parallelism.strategy is Strategy.single:
        raise UserError(
            f"parallelism=single is for one process, but {size} were started;"
            " start one, or choose parallelism=fsdp, ddp or hsdp"
        )
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        _connect(where, parallelism.timeout_seconds)
    _Connections.meetings += 1
    _Connections.parted = False
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    if where.type == "cuda":
        _require_own_gpus(where, patient)
    mesh = build_mesh(parallelism, where.type)
    return World(
        where,
        rank=dist.get_rank(),
        size=size,
        local_rank=local_rank,
        mesh=mesh,
        cpu_mesh=mesh if where.type == "cpu" else build_mesh(parallelism, "cpu"),
        patient=patient,
    )


def _require_own_gpus(device: torch.device, group: dist.ProcessGroup) -> None:
    """Raise UserError where two ranks have one GPU, of which NCCL would say less clearly, and later."""
    own = str(torch.cuda.get_device_properties(device).uuid)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, group=group)
    if found.count(own) > 1:
        sharing = [rank for rank, uuid in enumerate(found) if uuid == own]
        raise UserError(
            f"ranks {sharing[0]} and {sharing[1]} have the same GPU; start one process for each GPU of a node"
        )


def _connect(device: torch.device, timeout_seconds: float) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps one store over its restarts, with the addresses of those that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}", store)
    _Connections.store = dist.PrefixStore("parting", store)
    atexit.register(disconnect)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if on_gpu else None,  # or NCCL guesses it by the rank
    )


def build_mesh(parallelism: ParallelismConfig, device_type: str) -> "DeviceMesh":
    """All ranks as (replicas, shards), or as (shards,) for fsdp. Replicating is sharding among one."""
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    if parallelism.strategy is Strategy.fsdp:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    shards = shards_of(parallelism, size)
    if size % shards:
        raise UserError(
            f"parallelism=hsdp: groups of {shards} do not divide the {size} processes;"
            " give parallelism.shard_size a divisor"
        )
    return init_device_mesh(device_type, (size // shards, shards), mesh_dim_names=("replicate", "shard"))


def shards_of(parallelism: ParallelismConfig, size: int) -> int:
    """Ranks, of ``size``, that share one copy of the model."""
    match parallelism.strategy:
        case Strategy.fsdp:
            return size
        case Strategy.hsdp:
            return parallelism.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return 1
