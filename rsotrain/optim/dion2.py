"""Dion2: a part of the momentum orthogonalised at a time (Ahn et al., arXiv 2512.16928)."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.instruments.devices import device_kind
from rsotrain.optim.base import Settings
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.muon import Muon
from rsotrain.optim.stacks import put_back_, stacked
from rsotrain.parallel.sharding import Shard, local


def largest_rows(norms: Tensor, fraction: float) -> Tensor:
    """The indices of ⌈fraction·m⌉ rows with the largest ``norms`` (…, m).

    They ascend on a CPU; elsewhere they are as topk finds them, the same on all ranks, which spares a sort.
    """
    found = norms.topk(math.ceil(fraction * norms.shape[-1]), sorted=False).indices
    return found.sort().values if device_kind(norms.device) == "cpu" else found


def rows_of(stack: Tensor, index: Tensor) -> Tensor:
    """Some rows of each of n matrices; ``index``: (n, number of rows)."""
    if len(stack) == 1:
        return stack[0][index[0]].unsqueeze(0)
    return stack.gather(1, index.unsqueeze(2).expand(-1, -1, stack.shape[2]))


def add_to_rows_(stack: Tensor, index: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    """Add alpha·``rows`` to these rows of each of n matrices."""
    if len(stack) == 1:
        stack[0].index_add_(0, index[0], rows[0], alpha=alpha)
        return
    stack.scatter_add_(1, index.unsqueeze(2).expand_as(rows), rows if alpha == 1.0 else rows * alpha)


class Dion2(Muon):
    """M ← M + G;  W_K ← W_K − 0.2·√max(m, n)·η·NS(M_K);  M_K ← μM_K, W ← (1 − ηλ)W before.

    K are the rows of M (columns, if there are fewer) with the largest sums of absolute values, as in the
    authors' code. What has not been used stays in M whole, which is the error feedback. All ranks know the
    norms of all rows and choose the same K. Where the rows to choose from are sharded, a rank contributes
    those that it has; where the others are, each row is gathered. Only what is chosen travels.
    """

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        self._chosen: dict[str, Tensor] = {}  # K of the matrices between _momenta and _move

    def _turned(self, name: str) -> bool:
        """Are columns chosen? The matrix is transposed then, so that the rest speaks of rows."""
        rows, columns = self.shards[name].shape
        return rows > columns

    def _rows_are_sharded(self, name: str) -> bool:
        return self.shards[name].dim == (1 if self._turned(name) else 0)

    def _momenta(self, names: list[str], step: int) -> list[Tensor]:
        shard, turned = self.shards[names[0]], self._turned(names[0])
        kept = [self.moments[name]["momentum_buffer"] for name in names]
        wide = self.keeper.read(kept)
        buffers = stacked(wide)
        buffers.add_(self._gradients_of(names))
        momenta = buffers.mT if turned else buffers
        norms = torch.linalg.vector_norm(momenta, 1, dim=-1)
        if self._rows_are_sharded(names[0]):
            own, norms = norms, momenta.new_zeros(len(names), min(shard.shape))
            norms[:, shard.start : shard.stop] = own
        indices = largest_rows(shard.sum_(norms), self.config.fraction)
        self._chosen |= dict(zip(names, indices, strict=True))
        index, mine = self._of_rank(names[0], indices)
        if momenta.shape[1]:
            used = rows_of(momenta, index)
            used = used if mine is None else used * mine
            add_to_rows_(momenta, index, used, alpha=self.config.momentum - 1.0)
        else:
            used = momenta.new_zeros(len(names), indices.shape[1], momenta.shape[2])
        put_back_(wide, buffers)
        self.keeper.write(kept, wide, step)
        return list(used.unbind())

    def _gathered(self, name: str, piece: Tensor, owner: int) -> Tensor | None:
        shard = self.shards[name]
        if shard.dim is None:
            return piece
        if self._rows_are_sharded(name):
            dist.reduce(piece, group=shard.group, group_dst=owner)
            return piece if dist.get_rank(shard.group) == owner else None
        return self._part(name).gather(piece, owner)()

    def _part(self, name: str) -> Shard:
        """The shard of the chosen rows, which are whole on no rank."""
        shape = (len(self._chosen[name]), max(self.shards[name].shape))
        return replace(self.shards[name], shape=shape, dim=1)

    def _of_rank(self, name: str, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """For each chosen row its index among this rank's rows, and whether the rank has it (as a column).

        None: it has all.
        """
        shard = self.shards[name]
        if not self._rows_are_sharded(name):
            return indices, None
        mine = (indices >= shard.start) & (indices < shard.stop)
        last = max(0, shard.stop - shard.start - 1)
        return (indices - shard.start).clamp(0, last), mine.unsqueeze(-1)

    def _scattered(self, name: str, update: Tensor | None, owner: int) -> Tensor:
        shard, device = self.shards[name], self.parameters[name].device
        if self._rows_are_sharded(name):
            if update is None:
                shape = (len(self._chosen[name]), max(shard.shape))
                update = torch.empty(shape, dtype=self.ns_dtype, device=device)
            update = update.contiguous()
            dist.broadcast(update, group=shard.group, group_src=owner)
        elif shard.dim is not None:
            update = self._part(name).scatter(update, owner, device, self.ns_dtype)
        assert update is not None
        return update

    def _move(self, names: list[str], updates: Tensor, step: int, lr: float) -> None:
        parameter = self.parameters[names[0]]
        index, mine = self._of_rank(names[0], stacked([self._chosen.pop(name) for name in names]))
        shape = (len(names), *local(parameter).shape)
        wholes = torch.zeros(shape, dtype=work_dtype(parameter.dtype), device=parameter.device)
        rows = wholes.mT if self._turned(names[0]) else wholes
        if rows.shape[1]:
            add_to_rows_(rows, index, (updates if mine is None else updates * mine).to(wholes.dtype))
        super()._move(names, wholes, step, lr)
