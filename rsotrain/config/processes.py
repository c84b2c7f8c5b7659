"""What torchrun says of the processes of a run, in the environment of each."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from rsotrain.errors import UserError, require


@dataclass(frozen=True)
class Processes:
    """``size`` processes, of which this is number ``rank``; on its node ``local_rank`` of ``local_size``."""

    size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0


def processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """Raises UserError for numbers that are none, or that contradict each other."""
    size = whole_number(environment, "WORLD_SIZE", 1)
    require(size >= 1, f"WORLD_SIZE={size} must be positive")
    local_size = whole_number(environment, "LOCAL_WORLD_SIZE", size)
    require(
        1 <= local_size <= size, f"LOCAL_WORLD_SIZE={local_size} must lie between 1 and WORLD_SIZE={size}"
    )
    rank, local_rank = whole_number(environment, "RANK", 0), whole_number(environment, "LOCAL_RANK", 0)
    if "WORLD_SIZE" not in environment:
        return Processes()
    require(0 <= rank < size, f"RANK={rank} must lie between 0 and {size - 1}, for WORLD_SIZE={size}")
    require(
        0 <= local_rank < local_size,
        f"LOCAL_RANK={local_rank} must lie between 0 and {local_size - 1}, for LOCAL_WORLD_SIZE={local_size}",
    )
    return Processes(size, rank, local_size, local_rank)


def check_rendezvous(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where one of several processes is not told how to find the others."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        require(
            bool(environment.get(name)),
            f"WORLD_SIZE={environment.get('WORLD_SIZE')} says that there are several processes, but {name} is"
            " not set; start them with torchrun",
        )
    port = whole_number(environment, "MASTER_PORT", 0)
    require(0 < port < 2**16, f"MASTER_PORT={port} must lie between 1 and {2**16 - 1}")


def whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A number in the environment. Raises UserError for what is none."""
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"{name}={text} in the environment must be a whole number; unset it, or start with torchrun"
        ) from error
