"""Dion2: a part of the momentum orthogonalised at a time (Ahn et al., arXiv 2512.16928)."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.optim.base import Settings, gradient_of
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.muon import Muon
from rsotrain.parallel.sharding import local


def largest_rows(norms: Tensor, fraction: float) -> Tensor:
    """The indices of ⌈fraction·m⌉ rows with the largest ``norms`` (m), in ascending order."""
    return norms.topk(math.ceil(fraction * len(norms))).indices.sort().values


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
        self._chosen: dict[str, Tensor] = {}  # K of the matrices between _gathered and _move

    def _turned(self, name: str) -> bool:
        """Are columns chosen? The matrix is transposed then, so that the rest speaks of rows."""
        rows, columns = self.shards[name].shape
        return rows > columns

    def _rows_are_sharded(self, name: str) -> bool:
        return self.shards[name].dim == (1 if self._turned(name) else 0)

    def _gathered(self, name: str, owner: int, step: int) -> Tensor | None:
        shard, parameter = self.shards[name], self.parameters[name]
        kept = [self.moments[name]["momentum_buffer"]]
        buffers = self.keeper.read(kept)
        buffers[0].add_(gradient_of(name, parameter).to(work_dtype(parameter.dtype)))
        momentum = buffers[0].T if self._turned(name) else buffers[0]
        norms = momentum.new_zeros(min(shard.shape))
        own = norms[shard.start : shard.stop] if self._rows_are_sharded(name) else norms
        own.add_(torch.linalg.vector_norm(momentum, 1, dim=1))
        chosen = self._chosen[name] = largest_rows(shard.sum_(norms), self.config.fraction)
        index, mine = self._of_rank(name, chosen)
        if len(momentum):
            used = momentum[index] * mine
            momentum.index_add_(0, index, used, alpha=self.config.momentum - 1.0)
        else:
            used = momentum.new_zeros(len(chosen), momentum.shape[1])
        self.keeper.write(kept, buffers, step)
        if shard.dim is None:
            return used
        if self._rows_are_sharded(name):
            dist.reduce(used, group=shard.group, group_dst=owner)
            return used if dist.get_rank(shard.group) == owner else None
        return replace(shard, shape=(len(chosen), max(shard.shape)), dim=1).gather(used, owner)()

    def _of_rank(self, name: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """For each chosen row its index among this rank's rows, and whether the rank has it (as a column)."""
        shard = self.shards[name]
        if not self._rows_are_sharded(name):
            return chosen, torch.ones_like(chosen)[:, None]
        mine = (chosen >= shard.start) & (chosen < shard.stop)
        last = max(0, shard.stop - shard.start - 1)
        return (chosen - shard.start).clamp(0, last), mine[:, None]

    def _move(self, name: str, update: Tensor | None, owner: int, step: int, lr: float) -> None:
        shard, parameter, chosen = self.shards[name], self.parameters[name], self._chosen.pop(name)
        shape = (len(chosen), max(shard.shape))
        index, mine = self._of_rank(name, chosen)
        if self._rows_are_sharded(name):
            if update is None:
                update = torch.empty(shape, dtype=torch.bfloat16, device=parameter.device)
            update = update.contiguous()
            dist.broadcast(update, group=shard.group, group_src=owner)
        elif shard.dim is not None:
            part = replace(shard, shape=shape, dim=1)
            update = part.scatter(update, owner, parameter.device, torch.bfloat16)
        assert update is not None
        whole = torch.zeros_like(local(parameter), dtype=work_dtype(parameter.dtype))
        rows = whole.T if self._turned(name) else whole
        if len(rows):
            rows.index_add_(0, index, (update * mine).to(whole.dtype))
        self._apply(name, whole, step, lr)
