"""Which GPU is a process's own, and which of NCCL's errors mean that a peer is gone; no GPU is needed."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rsotrain.config.schema import Device
from rsotrain.errors import UserError
from rsotrain.parallel import ranks
from rsotrain.parallel.ranks import is_loss, resolve_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def count(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return count


def test_each_process_of_a_node_has_the_gpu_of_its_number(gpus: Any) -> None:
    gpus(4)
    assert [resolve_device(Device.auto, i).index for i in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="process 5 of this node has no GPU of its own, as there are 4"):
        resolve_device(Device.auto, 4)


def test_processes_that_see_one_gpu_each_have_that_one(gpus: Any) -> None:
    gpus(1)
    assert [resolve_device(Device.auto, i).index for i in (0, 3)] == [0, 0]
    assert resolve_device(Device.cpu, 3).type == "cpu"


@pytest.mark.parametrize("uuids", [["a", "b", "a"], ["a", "b", "c"]])
def test_two_ranks_of_one_gpu_are_refused(uuids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)

    def gather(found: list[Any], own: str, group: Any) -> None:
        assert own == "a"
        found[:] = uuids

    monkeypatch.setattr(dist, "all_gather_object", gather)
    shared = pytest.raises(UserError, match="ranks 0 and 2 have the same GPU; start one process for each GPU")
    with shared if uuids.count("a") > 1 else nullcontext():
        ranks._require_own_gpus(torch.device("cuda", 0), dist.GroupMember.NON_GROUP_MEMBER)


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistBackendError(f"{NCCL}remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)"), True),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234"), True),
        (dist.DistBackendError(f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details)"), False),
        (dist.DistBackendError(f"{NCCL}unhandled cuda error: out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_a_peer_that_is_gone_is_called_lost(error: RuntimeError, lost: bool) -> None:
    assert is_loss(error) == lost
