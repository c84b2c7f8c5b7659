"""How updated weights are stored: rounded once, bfloat16 ones to nearest or stochastically.

A bfloat16 weight has 8 significant bits, so that an update below 2⁻⁹ of it is lost where it is rounded to
nearest: at the rates at the end of a training most of them. Rounded stochastically it arrives on average. The
random numbers belong to (run seed, parameter, step, place in the whole weight): any number of ranks has the
same. A CPU draws a factor for each row and column; elsewhere they are counted, and one kernel moves many
weights (``rsotrain.optim.moving``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rsotrain.config.choices import WeightRounding
from rsotrain.instruments.devices import device_kind
from rsotrain.optim.moving import Place, move_all_
from rsotrain.optim.rounding import keys_of, random_factors, stochastic_round_by_
from rsotrain.parallel.sharding import Shard, local
from rsotrain.subspace.projection import Side, add_lifted_, oriented

_RUN_ELEMENTS = 1 << 20  # in float32 at a time: what fits a CPU's cache

Factors = tuple[Tensor, ...]
ALL_ROWS = slice(None)


class Weights:
    """This rank's pieces of the weights of a parameter group, to write to.

    ``seed``: of the run. Updates have the shape of the piece, or with ``side`` of its oriented view.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        shards: Mapping[str, Shard],
        rounding: WeightRounding,
        seed: int,
    ) -> None:
        self.parameters = parameters
        self.shards = shards
        self.rounding = rounding
        self.seed = seed
        self.places: dict[str, Place] = {}

    def in_runs(self, name: str) -> bool:
        """Is this weight moved by itself, a run of rows at a time that fits a CPU's cache?"""
        return device_kind(self.parameters[name].device) == "cpu"

    def _is_rounded_to_nearest(self, name: str) -> bool:
        nearest = self.rounding is WeightRounding.nearest
        return nearest or self.parameters[name].dtype is not torch.bfloat16

    def factors(self, name: str, step: int) -> Factors | None:
        """``random_factors`` of this rank's piece in ``step``, for each dimension; None: round to nearest."""
        parameter, shard = self.parameters[name], self.shards[name]
        if self._is_rounded_to_nearest(name):
            return None
        sizes = shard.shape
        both = random_factors(sum(sizes), self.seed, "weights", name, step, device=parameter.device)
        wholes = both.split(sizes)
        return tuple(w[shard.start : shard.stop] if i == shard.dim else w for i, w in enumerate(wholes))

    def store(self, name: str, value: Tensor, step: int) -> None:
        """W ← ``value``, of at least float32."""
        if not self.in_runs(name):
            self.move_all_([name], [value], 1.0, step, kept=0.0)
            return
        weight = local(self.parameters[name]).detach()
        factors = self.factors(name, step)
        if factors is None:
            weight.copy_(value)
            return
        for run, own in _runs(weight, factors):
            stochastic_round_by_(weight[run], value[run], own)

    def add_(
        self,
        name: str,
        update: Tensor,
        lr: float,
        step: int,
        *,
        decay: float,
        side: Side = Side.right,
        rows: slice = ALL_ROWS,
    ) -> None:
        """W ← (1 − ηλ)W + η·update, η: ``lr``, λ: ``decay``. May overwrite ``update``.

        ``rows``: those of this rank's piece that ``update`` is for.
        """
        update = oriented(update, side)
        if not self.in_runs(name):
            self.move_all_([name], [update], lr, step, kept=1.0 - lr * decay, rows=[rows])
            return
        weight = local(self.parameters[name]).detach()[rows]
        factors = self.factors(name, step)
        if factors is not None:
            factors = (factors[0][rows], *factors[1:])
        if factors is None:
            if decay:
                update = update.to(torch.promote_types(update.dtype, torch.float32)).sub_(weight, alpha=decay)
            weight.add_(update, alpha=lr)
            return
        for run, own in _runs(weight, factors):
            value = weight[run].to(torch.float32).mul_(1.0 - lr * decay).add_(update[run], alpha=lr)
            stochastic_round_by_(weight[run], value, own)

    def add_lifted_(
        self,
        name: str,
        low_rank: Tensor,
        basis: Tensor,
        lr: float,
        step: int,
        *,
        decay: float,
        side: Side = Side.right,
    ) -> None:
        """The same for the update ``low_rank`` Qᵀ, which is never whole in float32."""
        weight, kept = local(self.parameters[name]).detach(), 1.0 - lr * decay
        factors = self.factors(name, step) if self.in_runs(name) else None
        if self._is_rounded_to_nearest(name):
            add_lifted_(oriented(weight, side), low_rank, basis, lr, kept)
            return
        low_rank = low_rank.to(basis.dtype)
        left, right = (low_rank, basis.T) if side is Side.right else (basis, low_rank.T)
        if factors is None:
            self.move_all_([name], [left @ right], lr, step, kept=kept)
            return
        for run, own in _runs(weight, factors):
            product = left[run] @ right
            value = weight[run].to(torch.float32).mul_(kept).add_(product, alpha=lr)
            stochastic_round_by_(weight[run], value, own)

    def move_all_(
        self,
        names: Sequence[str],
        updates: Sequence[Tensor],
        lr: float,
        step: int,
        *,
        kept: float,
        rows: Sequence[slice] | None = None,
    ) -> None:
        """W ← kept·W + η·update for several weights, by one kernel. ``rows``: those of each W; None: all."""
        runs = rows or [ALL_ROWS] * len(names)
        kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i, name in enumerate(names):
            kind = self.parameters[name].dtype, self._is_rounded_to_nearest(name)
            kinds.setdefault(kind, []).append(i)
        for (_, nearest), own in kinds.items():
            weights = [local(self.parameters[names[i]]).detach()[runs[i]] for i in own]
            places = None if nearest else [self._place(names[i], runs[i].start or 0) for i in own]
            keys = keys_of(self.seed, "weights", step)
            move_all_(weights, [updates[i] for i in own], lr, kept, places=places, step=keys)

    def _place(self, name: str, first: int) -> Place:
        """Where the piece lies, beginning with its row (or entry) ``first``."""
        if name not in self.places:
            shard = self.shards[name]
            row, column = (shard.start if i == shard.dim else 0 for i in range(2))
            if len(shard.shape) == 1:  # a vector is one row
                row, column = column, row
            keys = keys_of(self.seed, "weights", name)
            self.places[name] = Place(row, column, shard.shape[-1], *keys)
        place = self.places[name]
        if len(self.shards[name].shape) == 1:
            return replace(place, column=place.column + first)
        return replace(place, row=place.row + first)


def factors_by_rows(factors: Factors | None, counts: Sequence[int]) -> list[Factors | None]:
    """The factors of runs of so many rows each."""
    if factors is None:
        return [None] * len(counts)
    return [(rows, *factors[1:]) for rows in factors[0].split(list(counts))]


def store_all(weights: Sequence[tuple[Tensor, Factors | None]], values: Sequence[Tensor]) -> None:
    """W ← value for each W with its factors; None: to nearest. The values are in float32."""
    nearest = [(w, v) for (w, factors), v in zip(weights, values, strict=True) if factors is None]
    if nearest:
        torch._foreach_copy_([w for w, _ in nearest], [v for _, v in nearest])
    for (weight, factors), value in zip(weights, values, strict=True):
        if factors is not None:
            stochastic_round_by_(weight, value, factors)


def _runs(weight: Tensor, factors: Factors) -> Iterator[tuple[slice, Factors]]:
    """Slices of ``weight`` in its first dimension of bounded size, with their factors."""
    step = max(1, _RUN_ELEMENTS // max(1, weight[:1].numel()))
    for start in range(0, weight.shape[0], step):
        run = slice(start, start + step)
        yield run, (factors[0][run], *factors[1:])
