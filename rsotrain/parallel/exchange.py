"""All-gather and reduce-scatter over gloo, each piece sent straight to the rank that needs it.

gloo's own reduce-scatter is an all-reduce of everything, and its all-gather copies every piece once more:
between two processes of one machine they take three times as long as these.
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WAITING = "exchange: waiting"  # in profiles


def is_direct(group: dist.ProcessGroup) -> bool:
    """Are these used in ``group``? Other backends' own collectives are better than what is here."""
    return dist.get_backend(group) == dist.Backend.GLOO


class Exchange(dist.Work):
    """What is under way between ranks. ``wait`` raises what gloo raises, where a rank is lost or late."""

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        super().__init__()
        self.works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        with torch.profiler.record_function(WAITING):
            for work in self.works:
                assert work is not None  # this rank is of the group
                work.wait()
        return True


def all_gather(out: Tensor, piece: Tensor, group: dist.ProcessGroup) -> Exchange:
    """Begin to fill ``out`` with the pieces of all ranks; ``piece`` may be this rank's part of it."""
    rank, size = group.rank(), group.size()
    pieces = out.chunk(size)
    works = []
    for peer in range(size):
        if peer != rank:
            works += [
                dist.isend(piece, group=group, group_dst=peer),
                dist.irecv(pieces[peer], group=group, group_src=peer),
            ]
    if pieces[rank].data_ptr() != piece.data_ptr():
        pieces[rank].copy_(piece)
    return Exchange(works)


class _Summing(Exchange):
    """``summands`` arrive by the first of ``works``, in this order, and are added to ``out`` in it."""

    def __init__(self, works: Sequence[dist.Work | None], out: Tensor, summands: Sequence[Tensor]) -> None:
        super().__init__(works)
        self.out, self.summands = out, summands

    def wait(self, timeout: timedelta | None = None) -> bool:
        super().wait(timeout)
        for summand in self.summands:
            self.out.add_(summand)
        self.works, self.summands = [], []  # what was sent and received is no longer needed
        return True


def reduce_scatter(out: Tensor, pieces: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin to make ``out`` this rank's part of the sum over ranks of ``pieces``, one part for each rank.

    ``out`` is right after ``wait``. Summands are always added in the same order.
    """
    if not is_direct(group):
        work = dist.reduce_scatter_single(out, pieces, group=group, async_op=True)
        assert work is not None  # this rank is of the group
        return work
    rank, size = group.rank(), group.size()
    parts = pieces.chunk(size)
    summands = [torch.empty_like(out) for _ in range(1, size)]
    arriving, leaving = [], []
    for shift in range(1, size):
        to, source = (rank + shift) % size, (rank - shift) % size
        leaving.append(dist.isend(parts[to], group=group, group_dst=to))
        arriving.append(dist.irecv(summands[shift - 1], group=group, group_src=source))
    return _Summing([*arriving, *leaving], out.copy_(parts[rank]), summands)


class _Allocating:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocating):
    """FSDP's interface of this name, which torch does not export. The gather is under way in any case."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Exchange:
        return all_gather(output_tensor, input_tensor, group)


class _ReduceScatter(_Allocating):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, "sums are all that FSDP is set to"
        reduce_scatter(output_tensor, input_tensor, group).wait()


def use_in(modules: Sequence[Any]) -> None:
    """Let these FSDPModules, in the order of their forward passes, gather weights and sum gradients so.

    Each asks for the weights of the next before it computes: there are no streams to do that on a CPU.
    """
    for module in modules:
        module.set_custom_all_gather(_AllGather())
        module.set_custom_reduce_scatter(_ReduceScatter())
    for module, following in pairwise(modules):
        module.set_modules_to_forward_prefetch([following])
