"""SLURM's variables in the words of torchrun, which are all that the rest of the package knows."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping

from rsotrain.config.processes import whole_number
from rsotrain.errors import require

# Below the range from which Linux takes the ports of outgoing connections.
FIRST_PORT, NUM_PORTS = 20000, 10000


def adopt_slurm_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Started by ``srun`` with several tasks: set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT, unless torchrun has.

    A batch script has SLURM's variables, too, but is no step; neither is a step of one task several
    processes. Tasks that a step starts get the same answer, without talking to each other and without
    SLURM's commands, which a container lacks. Raises UserError for variables that contradict each other, and
    where the node of the first task cannot be found out.
    """
    if "SLURM_STEP_ID" not in environment or "WORLD_SIZE" in environment:
        return
    size = whole_number(environment, "SLURM_STEP_NUM_TASKS", 1)
    nodes = whole_number(environment, "SLURM_STEP_NUM_NODES", 1)
    rank, local_rank = (whole_number(environment, f"SLURM_{name}", 0) for name in ("PROCID", "LOCALID"))
    local_size = _tasks_on_node(environment, size, nodes)
    require(
        0 <= rank < size and (size == 1 or 0 <= local_rank < local_size),
        f"SLURM calls this task {rank} of {size}, and {local_rank} of {local_size} on its node:"
        " a heterogeneous step, it seems; start one component (srun --het-group=0), or use torchrun",
    )
    if size == 1:
        return
    address = environment.get("MASTER_ADDR") or (
        "127.0.0.1" if nodes == 1 else _first_node(environment, rank)
    )
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(local_size),
        MASTER_ADDR=address,
    )
    environment.setdefault("MASTER_PORT", str(_port(environment)))


def _tasks_on_node(environment: Mapping[str, str], size: int, nodes: int) -> int:
    """``SLURM_STEP_TASKS_PER_NODE`` is run-length coded: 2(x3),1."""
    coded = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, times in coded for _ in range(int(times or 1))]
    node = whole_number(environment, "SLURM_NODEID", 0)
    return counts[node] if 0 <= node < len(counts) else size // max(nodes, 1)


def _first_node(environment: Mapping[str, str], rank: int) -> str:
    """The node of the first task: the first of the list, unless the user has put tasks elsewhere."""
    coded = environment.get("SLURM_STEP_NODELIST", "")
    hosts = list(hostnames(coded))
    require(bool(hosts), f"SLURM_STEP_NODELIST={coded} does not name the first node; set MASTER_ADDR")
    node, own = whole_number(environment, "SLURM_NODEID", 0), environment.get("SLURMD_NODENAME")
    # SLURM sorts the list. Tasks come in another order with a hostfile, and with components of a step.
    elsewhere = own in hosts and hosts.index(own) != node
    arbitrary = environment.get("SLURM_DISTRIBUTION", "").startswith("arbitrary")
    require(
        not elsewhere and not arbitrary and not (rank == 0 and node > 0),
        f"the first task of this step need not be on the first of its nodes, {coded};"
        " set MASTER_ADDR to the node of the first task",
    )
    return hosts[0]


def hostnames(coded: str) -> Iterator[str]:
    """What ``scontrol show hostnames`` makes of ``n[01-03,7],login``: n01, n02, n03, n7, login."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", coded):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text, range, text, range, …
        choices = [[piece] if i % 2 == 0 else list(_numbers(piece)) for i, piece in enumerate(pieces)]
        yield from map("".join, itertools.product(*choices))


def _numbers(ranges: str) -> Iterator[str]:
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            yield from (str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1))


def _port(environment: Mapping[str, str]) -> int:
    """One for each step, so that two jobs on a node do not meet."""
    job, step = (whole_number(environment, f"SLURM_{name}_ID", 0) for name in ("JOB", "STEP"))
    return FIRST_PORT + (job * 31 + step) % NUM_PORTS
