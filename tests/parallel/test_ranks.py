"""How ranks part: none leaves while another still waits for it, and a lost one is not waited for."""

import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import ranks

from rsotrain.config.schema import Device, ParallelismConfig, Strategy
from rsotrain.parallel import ranks as parallel
from rsotrain.parallel.ranks import World, start


def again() -> World:
    return start(ParallelismConfig(Strategy.fsdp, timeout_seconds=60), Device.cpu)


def parting(late: int, world: World) -> tuple[float, float]:
    """(when this rank came, when it left); rank ``late`` is a second late."""
    world = again()
    with world.ending_together():
        time.sleep(1.0 if world.rank == late else 0.0)
        came = time.monotonic()
    return came, time.monotonic()


def stopping(world: World) -> float:
    """Seconds that ranks which stop in good order wait for the one that is late."""
    world = again()
    start_of_wait = time.monotonic()
    time.sleep(float(world.rank))
    with pytest.raises(InterruptedError), world.ending_together(InterruptedError):
        raise InterruptedError
    return time.monotonic() - start_of_wait


def failing(world: World) -> float:
    world = again()
    start_of_wait = time.monotonic()
    with pytest.raises(ZeroDivisionError), world.ending_together(InterruptedError):
        raise ZeroDivisionError
    assert not parallel._Connections.parted
    return time.monotonic() - start_of_wait


def leaving(world: World) -> bool:
    """The connections of a failed run are left alone, those of one in good order are closed."""
    world = again()
    parallel.disconnect()
    still = dist.is_initialized()
    with world.ending_together():
        pass
    return still


@pytest.mark.slow
def test_ranks_part_together(tmp_path: Path) -> None:
    checks = {f"late {late}": partial(parting, late) for late in range(3)}
    checks |= {"stopping": stopping, "failing": failing, "leaving": leaving}  # type: ignore[dict-item]
    outcomes = {name: ranks.succeeded(found) for name, found in ranks.run(3, checks, tmp_path).items()}
    for late in range(3):
        times = outcomes[f"late {late}"]
        assert max(came for came, _ in times) <= min(left for _, left in times)  # one clock for all processes
    assert min(outcomes["stopping"]) > 1.9
    assert max(outcomes["failing"]) < 5.0
    assert outcomes["leaving"] == [True] * 3


def test_one_process_has_nobody_to_wait_for() -> None:
    import torch

    with World(torch.device("cpu")).ending_together():
        pass
    parallel.disconnect()
