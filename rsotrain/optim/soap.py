"""SOAP: Adam in the eigenbases of Shampoo's preconditioners (Vyas et al., ICLR 2025, arXiv 2409.11321)."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rsotrain.config.methods import SoapConfig
from rsotrain.instruments.phases import Phase, phase
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import chosen
from rsotrain.optim.eigenbases import first_bases, refreshed_bases
from rsotrain.optim.functional import Betas
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.stacks import products, put_back_, stacked, stacks_of
from rsotrain.optim.state_size import MatrixSize, Shape, StateSize
from rsotrain.parallel.sharding import Shard, local

# Of the rows (outputs) of a matrix, and of its columns (inputs): L and Q_L, R and Q_R
SIDES = ("left", "right")
# By the index of the side: this rank's rows of a stack of square matrices, (n, rows, size)
Pieces = Mapping[int, Tensor]


def in_bases(stack: Tensor, bases: Pieces, shard: Shard) -> Tensor:
    """Q_Lᵀ G Q_R, this rank's pieces, from those of G. ``shard``: of both stacks, (n, m, n)."""
    for side in _sharded_side_last(bases, shard):
        basis = bases[side]
        stack = products(basis.mT, stack) if side == 0 else products(stack, basis)
        if shard.dim == side + 1:
            stack = shard.of(shard.sum_(stack))
    return stack


def out_of_bases(stack: Tensor, bases: Pieces, shard: Shard) -> Tensor:
    """Q_L N Q_Rᵀ, this rank's pieces, from those of N."""
    for side in _sharded_side_last(bases, shard):
        basis = bases[side]
        whole = shard.all_gather(stack) if shard.dim == side + 1 else stack
        stack = products(basis, whole) if side == 0 else products(whole, basis.mT)
    return stack


def _sharded_side_last(bases: Pieces, shard: Shard) -> list[int]:
    return sorted(bases, key=lambda side: shard.dim == side + 1)


def negative_updates_(
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bases: Pieces,
    shard: Shard,
    count: int,
    *,
    betas: Betas,
    eps: float,
) -> Tensor:
    """−Q_L N' Q_Rᵀ after M ← β₁M + (1−β₁)G and V ← β₂V + (1−β₂)G'²; this rank's pieces, (n, …).

    N' = M̂'/(√V̂ + ε) with M' = Q_Lᵀ M Q_R (arXiv 2409.11321, algorithm 3). ``exp_avg``: M, and
    ``exp_avg_sq``: V, which are updated; ``count``: of gradients in them.
    """
    exp_avg.lerp_(gradients, 1.0 - betas[0])
    rotated = in_bases(gradients, bases, shard)
    exp_avg_sq.mul_(betas[1]).addcmul_(rotated, rotated, value=1.0 - betas[1])
    roots = (exp_avg_sq / (1.0 - betas[1] ** count)).sqrt_().add_(eps)
    updates = in_bases(exp_avg, bases, shard) / roots
    return out_of_bases(updates.mul_(-1.0 / (1.0 - betas[0] ** count)), bases, shard)


def add_grams_(grams: Pieces, gradients: Tensor, shard: Shard, decay: float) -> None:
    """L ← β₂L + (1−β₂)GGᵀ and R ← β₂R + (1−β₂)GᵀG, this rank's rows of them."""
    sharded = shard.dim is not None and shard.dim - 1 in grams
    whole = shard.all_gather(gradients) if sharded else gradients
    for side, gram in grams.items():
        own, other = (gradients, whole.mT) if side == 0 else (gradients.mT, whole)
        rows_sharded = shard.dim == side + 1
        product = products(own, other if rows_sharded else own.mT)
        gram.lerp_(product if rows_sharded else shard.sum_(product), 1.0 - decay)


def refresh_(basis: Tensor, gram: Tensor, rows: Shard, *, first: bool) -> None:
    """Q ← QR(PQ), or for the first time the eigenvectors of P. ``rows``: of the stacks of both."""
    whole = rows.all_gather(basis)
    if first:
        new = first_bases(rows.all_gather(gram), whole)
    else:
        new = refreshed_bases(rows.all_gather(products(gram, whole)), whole)
    basis.copy_(rows.of(new))


def preconditioned(shape: Shape, longest: int) -> list[int]:
    """The sides, 0 and 1, that have a preconditioner."""
    return [side for side, size in enumerate(shape) if size <= longest]


class Soap(ParamGroupOptimizer):
    """W ← (1 − ηλ)W − η Q_L N' Q_Rᵀ, where N' is Adam's update in the coordinates G' = Q_Lᵀ G Q_R.

    After the weights L ← β₂L + (1−β₂)GGᵀ and R ← β₂R + (1−β₂)GᵀG are updated, and every f-th step
    (``precondition_frequency``) ends with Q_L ← QR(L Q_L) and Q_R ← QR(R Q_R). V stays as it is then.

    As in the authors' code the first gradient gives the bases, the eigenvectors of its L and R, and no
    update, N' = 0: in its own eigenbasis it is diagonal, and V would be 0 beside the diagonal. Their code
    also sorts the columns of Q by eigenvalues at each refresh, which the paper does not. A side longer than
    ``max_preconditioner_dim`` has no L and Q, as if Q were 1; with neither side this is Adam.

    L, R and the bases are float32 for any ``state_dtype``: Adam scales up the directions of small
    eigenvalues, which would be rounding errors otherwise. Where a weight is sharded in its rows, so are L and
    Q_L, and each rank has all of R and Q_R; where in its columns, the other way round. A step gathers G and
    N' and sums G', M' and the Gram matrix that is not sharded; a refresh gathers Q and LQ, which each rank
    decomposes.
    """

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: SoapConfig,
    ) -> None:
        settings = replace(settings, betas=config.eigenbasis_betas)
        super().__init__(label, parameters, peak_lr, settings, config)
        for name, parameter in parameters.items():
            shard = self.shards[name]
            for key in ("exp_avg", "exp_avg_sq"):
                self.add_moment(name, key, local(parameter).shape, shard.dim)
            for side in preconditioned(shard.shape, self.config.max_preconditioner_dim):
                size, dim = shard.shape[side], 0 if shard.dim == side else None
                whole = torch.eye(size, dtype=work_dtype(parameter.dtype), device=parameter.device)
                rows = whole if dim is None else whole[shard.start : shard.stop]
                self.add_tensor(name, f"{SIDES[side]}_gram", torch.zeros_like(rows), dim)
                self.add_tensor(name, f"{SIDES[side]}_basis", rows.clone(), dim)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        sides = preconditioned(matrix.shape, config.max_preconditioner_dim)
        wide = sum(2 * matrix.piece[side] * matrix.shape[side] for side in sides)
        return StateSize((matrix.piece, matrix.piece), wide=wide)

    def is_replicated(self, name: str, key: str) -> bool:
        """So are L and Q of the side that is not sharded."""
        side, _, kind = key.partition("_")
        return kind in ("gram", "basis") and SIDES.index(side) != self.shards[name].dim

    def costliest_step(self) -> int | None:
        return max(2, self.config.precondition_frequency)

    @cached_property
    def stacks(self) -> list[list[str]]:
        """By the largest temporary: a matrix of the longer side in float64, which a refresh decomposes."""
        squares = {name: Shard((max(shard.shape),) * 2) for name, shard in self.shards.items()}
        return stacks_of(self.parameters, self.stack_kind, squares, torch.float64.itemsize)

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        for own in chosen(self.stacks, names):
            self._update_stack(own, step, self.peak_lr * lr_factor)

    def _update_stack(self, names: list[str], step: int, lr: float) -> None:
        shard = _of_stack(self.shards[names[0]], len(names))
        gradients = stacked([gradient_of(name, self.parameters[name]) for name in names])
        gradients = gradients.to(work_dtype(gradients.dtype))
        bases = self._pieces(names, "basis")
        first = step == 1 and bool(bases)
        updates = torch.zeros_like(gradients) if first else self._updates(names, gradients, bases, step)
        self.apply_stack_(names, updates, lr, step)
        grams = self._pieces(names, "gram")
        add_grams_(grams, gradients, shard, self.settings.betas[1])
        self._keep(names, "gram", grams)
        if bases and (first or step % self.config.precondition_frequency == 0):
            with phase(Phase.refresh):
                for side, basis in bases.items():
                    refresh_(basis, grams[side], _rows(shard, side), first=first)
                self._keep(names, "basis", bases)

    def _updates(self, names: list[str], gradients: Tensor, bases: Pieces, step: int) -> Tensor:
        kept = [[self.moments[name][key] for name in names] for key in ("exp_avg", "exp_avg_sq")]
        wide = [self.keeper.read(own) for own in kept]
        exp_avg, exp_avg_sq = (stacked(own) for own in wide)
        shard, count = _of_stack(self.shards[names[0]], len(names)), step - 1 if bases else step
        betas, eps = self.settings.betas, self.settings.eps
        updates = negative_updates_(gradients, exp_avg, exp_avg_sq, bases, shard, count, betas=betas, eps=eps)
        for own, values, stack in zip(kept, wide, (exp_avg, exp_avg_sq), strict=True):
            put_back_(values, stack)
            self.keeper.write(own, values, step)
        return updates

    def _pieces(self, names: list[str], kind: str) -> Pieces:
        sides = preconditioned(self.shards[names[0]].shape, self.config.max_preconditioner_dim)
        keys = {side: f"{SIDES[side]}_{kind}" for side in sides}
        return {side: stacked([self.state[name][key] for name in names]) for side, key in keys.items()}

    def _keep(self, names: list[str], kind: str, pieces: Pieces) -> None:
        for side, stack in pieces.items():
            put_back_([self.state[name][f"{SIDES[side]}_{kind}"] for name in names], stack)


def _of_stack(shard: Shard, length: int) -> Shard:
    """Of a stack of so many pieces like this one, (n, …)."""
    dim = None if shard.dim is None else shard.dim + 1
    return replace(shard, shape=(length, *shard.shape), dim=dim)


def _rows(shard: Shard, side: int) -> Shard:
    """Of a stack of square matrices of a side, whose rows are sharded if the side is.

    ``shard``: of a stack of weights.
    """
    size = shard.shape[side + 1]
    dim = 1 if shard.dim == side + 1 else None
    return replace(shard, shape=(shard.shape[0], size, size), dim=dim)
