"""Advice when a run is out of memory: the largest part of the peak, and the changes that reduce it most."""

import errno
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rsotrain.config.choices import BasisStorage, RestRule, StateDtype, WeightRounding
from rsotrain.config.methods import LoRAConfig, RSOConfig, SubspaceConfig
from rsotrain.config.samplers import HaarConfig
from rsotrain.config.schema import ActivationCheckpointing, Config, Device, Precision, Strategy
from rsotrain.errors import TrainingError, UserError
from rsotrain.parallel.ranks import World
from rsotrain.planner.floor import holds_grams_at_once, is_random
from rsotrain.tracking.formats import format_bytes

# messages of torch's CPU allocator, of CUDA outside torch's allocator, and of libraries without a workspace
_SAID = re.compile(
    r"DefaultCPUAllocator: |CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc"
)
_SHOWN = 3
_TIMEOUT_SECONDS = 600.0
_MAX_TOKENS = 8192  # of a micro-batch that is planned as it is


def is_out_of_memory(error: BaseException) -> bool:
    """Is ``error`` from a GPU, torch's CPU allocator, Python or the kernel being out of memory?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None


@contextmanager
def explaining_out_of_memory(config: Config, world: World) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that says what would help.

    Another process makes the plan: this one has no memory left and may be a rank of a process group.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        parallelism = replace(config.parallelism, world_size=world.size)
        device = Device.cuda if world.device.type == "cuda" else Device.cpu
        planned = replace(config, parallelism=parallelism, device=device)
        said = f"out of memory{_wanted(error)}"
        print(f"{said}: planning what would help, which may take minutes", file=sys.stderr, flush=True)
        raise TrainingError(f"{said}; {_advice_of_process(planned)}") from error


def _wanted(error: BaseException) -> str:
    """The size of the failed allocation, if the error states it (GPU errors in GiB, CPU errors in bytes)."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    size = format_bytes(int(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f" (no room for another {size})"


def _advice_of_process(config: Config) -> str:
    command = [sys.executable, "-m", "rsotrain.planner.out_of_memory"]
    try:
        done = subprocess.run(
            command, input=pickle.dumps(config), capture_output=True, timeout=_TIMEOUT_SECONDS, check=True
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return "a smaller micro_batch_size or activation_checkpointing=block may help; see mode=plan"


@dataclass(frozen=True)
class Option:
    """``change``: the override for the command line. ``config``: the settings with it."""

    change: str
    config: Config


def options(config: Config) -> Iterator[Option]:
    """Changes of settings that may reduce the memory of a run."""
    optimizer = config.optimizer
    size = config.parallelism.world_size or 1
    of_rank = config.batch_size // size
    micro = config.micro_batch_size or of_rank
    smaller = [n for n in range(1, micro // 2 + 1) if of_rank % n == 0]
    if smaller:
        yield Option(f"micro_batch_size={smaller[-1]}", replace(config, micro_batch_size=smaller[-1]))
    if config.activation_checkpointing is not ActivationCheckpointing.block:
        block = ActivationCheckpointing.block
        yield Option("activation_checkpointing=block", replace(config, activation_checkpointing=block))
    if config.precision is not Precision.bf16:
        rounded = replace(optimizer, weight_rounding=WeightRounding.stochastic)  # its default there
        yield Option("precision=bf16", replace(config, precision=Precision.bf16, optimizer=rounded))

    def with_optimizer(change: str, **settings: Any) -> Option:
        return Option(change, replace(config, optimizer=replace(optimizer, **settings)))

    if optimizer.state_dtype is not StateDtype.int8:
        yield with_optimizer("optimizer.state_dtype=int8", state_dtype=StateDtype.int8)
        if optimizer.rest is RestRule.adam:
            yield with_optimizer("optimizer.rest=adam8bit", rest=RestRule.adam8bit)
    if isinstance(optimizer, SubspaceConfig | LoRAConfig):
        rank = optimizer.rank / 2 if isinstance(optimizer.rank, float) else optimizer.rank // 2
        if rank:
            yield with_optimizer(f"optimizer.rank={rank}", rank=rank)
    haar = HaarConfig(name="haar")
    if isinstance(optimizer, RSOConfig):
        if optimizer.projection is BasisStorage.stored:
            yield with_optimizer("optimizer.projection=regenerated", projection=BasisStorage.regenerated)
        if holds_grams_at_once(config):
            yield with_optimizer("optimizer.staggered=true", staggered=True)
        if not is_random(config.sampler):
            yield Option("sampler=haar", replace(config, sampler=haar))
    else:
        own = {key: getattr(optimizer, key) for key in ("state_dtype", "weight_rounding", "rest", "groups")}
        rso = RSOConfig(name="rso", lr=optimizer.lr, **own)
        yield Option("optimizer=rso", replace(config, optimizer=rso, sampler=haar))
    if config.batch_size % (2 * size) == 0:
        strategy = config.parallelism.strategy
        strategy = Strategy.fsdp if strategy in (Strategy.single, Strategy.ddp) else strategy
        parallelism = replace(config.parallelism, strategy=strategy, world_size=2 * size)
        yield Option(
            f"parallelism={strategy.name} on {2 * size} processes",
            replace(config, parallelism=parallelism, micro_batch_size=min(micro, of_rank // 2)),
        )


def planned_peak(config: Config) -> dict[str, float]:
    """Bytes by kind, and their sum ``peak``, at the planned moment of most memory.

    Peaks of large micro-batches are extrapolated from two small ones, since the time of planning grows with
    the chunks of the loss.
    """
    from rsotrain.planner.fake_run import with_micro_batches, world_size
    from rsotrain.planner.plan import make_plan

    micro = config.micro_batch_size or config.batch_size // world_size(config)
    largest = max(2, _MAX_TOKENS // config.seq_len)
    if micro <= largest:
        phases = [dict[str, float](phase) for phase in make_plan(config, gpus=False).phases.values()]
        return max(phases, key=lambda phase: phase["peak"])
    small, large = largest // 2, largest
    of_small, of_large = (
        make_plan(with_micro_batches(config, size), gpus=False).phases for size in (small, large)
    )
    phases = [
        {
            kind: nbytes + (nbytes - of_small[phase][kind]) / (large - small) * (micro - large)
            for kind, nbytes in of_large[phase].items()
        }
        for phase in of_large
    ]
    return max(phases, key=lambda phase: phase["peak"])


def advice(config: Config) -> str:
    """The largest part of the planned peak and the options that reduce it most, in one sentence."""
    planned = planned_peak(config)
    peak = planned["peak"]
    name, nbytes = max(((k, v) for k, v in planned.items() if k != "peak"), key=lambda part: part[1])
    saved: list[tuple[float, str]] = []
    for option in options(config):
        try:
            saved.append((peak - planned_peak(option.config)["peak"], option.change))
        except UserError:  # the change does not go with the run's other settings
            continue
    best = [(gain, change) for gain, change in sorted(saved, reverse=True) if gain > 0][:_SHOWN]
    said = f"of the planned peak of {format_bytes(peak)} the largest part is {name}, {format_bytes(nbytes)}"
    if not best:
        return said
    return f"{said}; {', '.join(f'{change} would save {format_bytes(gain)}' for gain, change in best)}"


if __name__ == "__main__":
    print(json.dumps(advice(pickle.load(sys.stdin.buffer))))
