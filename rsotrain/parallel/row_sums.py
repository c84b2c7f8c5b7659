"""Sums over ranks of gradients whose rows are divided among them, made within the backward pass."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rsotrain.parallel import exchange
from rsotrain.parallel.sharding import Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RowSums:
    """This rank's rows of the summed gradients of leaf tensors (out × r), in float32 at least.

    ``buckets``: the leaves by name. As soon as the backward pass of a micro-batch has the gradients of a
    bucket, one reduce-scatter begins and these gradients are dropped; it is waited for when the next bucket
    is complete. ``shards``: of the weights (out × in) of the same names, split by rows. Replicas add their
    sums once, in ``finish``.
    """

    def __init__(
        self, buckets: Iterable[Mapping[str, Tensor]], shards: Mapping[str, Shard], mesh: "DeviceMesh"
    ) -> None:
        self.mesh = mesh
        self.buckets = [_Bucket(dict(leaves), shards, mesh["shard"].size()) for leaves in buckets]
        self.reducing: _Bucket | None = None
        for bucket in self.buckets:
            for name, leaf in bucket.leaves.items():
                leaf.register_post_accumulate_grad_hook(partial(self._arrived, bucket, name))

    def _arrived(self, bucket: "_Bucket", name: str, leaf: Tensor) -> None:
        bucket.arrived.add(name)
        if len(bucket.arrived) == len(bucket.leaves):
            self._settle()
            bucket.begin(self.mesh)
            self.reducing = bucket

    def _settle(self) -> None:
        if self.reducing is not None:
            self.reducing.end()
            self.reducing = None

    def finish(self) -> dict[str, Tensor]:
        """The sums by name: (this rank's rows) × r each. Called after the last micro-batch of a step."""
        self._settle()
        sums: dict[str, Tensor] = {}
        for bucket in self.buckets:
            if bucket.total is None:
                raise RuntimeError(
                    f"{next(iter(bucket.leaves))} has no gradient: it took no part in the loss"
                )
            if self.mesh.ndim > 1:
                dist.all_reduce(bucket.total, group=self.mesh.get_group("replicate"))
            sums |= bucket.rows()
        return sums

    def tensors(self) -> Iterator[Tensor]:
        """What there is of the sums so far."""
        for bucket in self.buckets:
            yield from (total for total in (bucket.total, bucket.part) if total is not None)

    def clear(self) -> None:
        """Forget the sums; what is under way is waited for."""
        self._settle()
        for bucket in self.buckets:
            bucket.arrived.clear()
            bucket.total = None


@dataclass
class _Bucket:
    leaves: dict[str, Tensor]
    shards: Mapping[str, Shard]
    pieces: int

    def __post_init__(self) -> None:
        self.arrived: set[str] = set()
        self.total: Tensor | None = None  # this rank's rows, those of all leaves in one
        self.part: Tensor | None = None  # of the micro-batch that is being reduced
        self.work: dist.Work | None = None
        # as FSDP divides rows: all pieces are of the first one's size but for padding
        self.chunks = {name: -(-leaf.shape[0] // self.pieces) for name, leaf in self.leaves.items()}
        self.sizes = [self.chunks[name] * leaf.shape[1] for name, leaf in self.leaves.items()]

    def begin(self, mesh: "DeviceMesh") -> None:
        gradients = [leaf.grad for leaf in self.leaves.values() if leaf.grad is not None]
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        sent = gradients[0].new_empty((self.pieces, sum(self.sizes)), dtype=wide)
        torch._chunk_cat(gradients, 0, self.pieces, out=sent)
        for leaf in self.leaves.values():
            leaf.grad = None
        self.arrived.clear()
        self.part = sent[0]
        if self.pieces > 1:
            self.part = torch.empty_like(self.part)
            self.work = exchange.reduce_scatter(self.part, sent.flatten(), mesh.get_group("shard"))

    def end(self) -> None:
        assert self.part is not None
        if self.work is not None:
            self.work.wait()
        self.total = self.part if self.total is None else self.total.add_(self.part)
        self.part = self.work = None

    def rows(self) -> dict[str, Tensor]:
        assert self.total is not None
        result = {}
        for (name, leaf), flat in zip(self.leaves.items(), self.total.split(self.sizes), strict=True):
            shard = self.shards[name]
            num_rows = leaf.shape[0] if shard.dim is None else shard.stop - shard.start
            result[name] = flat.view(self.chunks[name], leaf.shape[1])[:num_rows]
        return result
