"""SLURM's variables in the words of torchrun, which are all that the rest of the package knows."""

import os
import subprocess
from collections.abc import MutableMapping

from rsotrain.errors import UserError

# Below the range from which Linux takes the ports of outgoing connections.
FIRST_PORT, NUM_PORTS = 20000, 10000


def adopt_slurm_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Started by ``srun`` with several tasks: set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT, unless torchrun has.

    A batch script has SLURM's variables, too, but is no step; neither is a step of one task several
    processes. Tasks that a step starts get the same answer, without talking to each other. Raises
    UserError where the first node's name cannot be found out.
    """
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_ID" not in environment or size == 1 or "WORLD_SIZE" in environment:
        return
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    local_size = _tasks_on_node(environment, size, nodes)
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(local_size),
    )
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if nodes == 1 else _first_node(environment))
    environment.setdefault("MASTER_PORT", str(_port(environment)))


def _tasks_on_node(environment: MutableMapping[str, str], size: int, nodes: int) -> int:
    """``SLURM_STEP_TASKS_PER_NODE`` is run-length coded: 2(x3),1."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        if count:
            counts += [int(count)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else size // nodes


def _first_node(environment: MutableMapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"`scontrol show hostnames {nodes}` does not name the first node ({error}); set MASTER_ADDR"
        ) from error


def _port(environment: MutableMapping[str, str]) -> int:
    """One for each step, so that two jobs on a node do not meet."""
    return (
        FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 31 + int(environment["SLURM_STEP_ID"])) % NUM_PORTS
    )
