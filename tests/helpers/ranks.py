"""Ranks of a test: processes forked from it that talk over gloo and run many checks in one start."""

import multiprocessing.forkserver
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # these two before the fork, which then costs milliseconds
import torch.distributed.fsdp
import torch.multiprocessing

from rsotrain.config.schema import Device, ParallelismConfig, Strategy
from rsotrain.parallel.ranks import World, disconnect, start

Check = Callable[[World], Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _enter(
    rank: int, size: int, port: int, parallelism: ParallelismConfig, checks: dict[str, Check], out: str
) -> None:
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    # that of an earlier test is the parent's: a fork cannot use it
    server = multiprocessing.forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    world = start(parallelism, Device.cpu)
    for name, check in checks.items():
        outcome: Any
        try:
            outcome = check(world)
        except Exception:
            outcome = AssertionError(f"rank {rank} of {size}, {name}:\n{traceback.format_exc()}")
        torch.save(outcome, f"{out}/{name}-{rank}.pt")
        dist.barrier()
    # of its own: the runs among the checks have parted by themselves
    world = start(parallelism, Device.cpu)
    with world.ending_together():
        pass
    disconnect()


def run(
    size: int,
    checks: dict[str, Check],
    folder: Path,
    strategy: Strategy = Strategy.fsdp,
    shard_size: int | None = None,
) -> dict[str, list[Any]]:
    """What each check returned on each rank, by name; an AssertionError where it raised."""
    parallelism = ParallelismConfig(strategy, shard_size=shard_size, timeout_seconds=60)
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _enter, (size, free_port(), parallelism, checks, str(folder)), size, start_method="fork"
    )
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)]
        for name in checks
    }


def succeeded(outcomes: list[Any]) -> list[Any]:
    """The outcomes of one check; raises the first failure."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes
