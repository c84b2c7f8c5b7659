"""The base of methods without a subspace that update each parameter by itself."""

import math
from abc import abstractmethod
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.instruments.devices import device_kind
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import chosen
from rsotrain.optim.moments import Moment, work_dtype
from rsotrain.optim.stacks import put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, Shape, StateSize
from rsotrain.optim.weights import ALL_ROWS
from rsotrain.parallel.sharding import local

# Elements that a CPU updates at a time, so that temporaries stay in its cache. Others take whole matrices.
CACHE_ELEMENTS = 1 << 19
ROW_UNIT = 64


class FullRankOptimizer(ParamGroupOptimizer):
    """A method defines the shapes of its moments and the negative update of one parameter.

    ``row_local``: each row's update needs that row alone, so that a CPU may take a run of rows at a time.
    """

    row_local: ClassVar[bool] = False
    # Does ``negative_update`` want gradients in at least float32? Else it has them in the dtype of weights.
    widens: ClassVar[bool] = True

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        for name, parameter in parameters.items():
            shapes = self.moment_shapes(config, name, tuple(local(parameter).shape))
            for key, shape in shapes.items():
                self.add_moment(name, key, shape, self.shards[name].dim)

    @classmethod
    @abstractmethod
    def moment_shapes(cls, config: Any, name: str, piece: Shape) -> Mapping[str, Shape]:
        """The moments by name, with their shapes for this rank's piece; sharded as the parameter is."""

    @abstractmethod
    def negative_update(self, name: str, gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
        """Update ``moments`` in place and return −U for W ← (1 − ηλ)W − ηU.

        ``gradient``: of the piece; where the method is ``row_local``, of a run of its rows or, on a GPU, of
        all rows of several parameters with one ``stack_kind``, of which ``name`` is the first. In at least
        float32 where the method ``widens``; it must not be changed. ``moments``: in the order of
        ``moment_shapes``, of the same rows.
        """

    def whole(self, name: str) -> bool:
        """Is this parameter's update an exception to ``row_local``?"""
        return not self.row_local

    def stack_kind(self, name: str) -> Hashable:
        """Where rows are treated one by one, a stack is one matrix with the rows of several."""
        alone = name if self.whole(name) else None
        return super().stack_kind(name), tuple(self.moments[name]), alone

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return StateSize(tuple(cls.moment_shapes(config, matrix.name, matrix.piece).values()))

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        if self.in_stacks:
            for stack in chosen(self.stacks, names):
                self._update_stack(stack, step, lr)
            return
        for name in names:
            gradient = gradient_of(name, self.parameters[name])
            kept = list(self.moments[name].values())
            in_cache = device_kind(gradient.device) == "cpu" and not self.whole(name)
            limit = CACHE_ELEMENTS if in_cache else gradient.numel()
            for rows, own in row_runs(gradient, kept, limit):
                wide = self.keeper.read(own)
                update = self.negative_update(name, self._widened(gradient[rows]), wide, step)
                self.keeper.write(own, wide, step)
                self.apply_(name, update, lr, step, rows=rows)

    def _widened(self, gradient: Tensor) -> Tensor:
        return gradient.to(work_dtype(gradient.dtype)) if self.widens else gradient

    def _update_stack(self, names: list[str], step: int, lr: float) -> None:
        """Update parameters of a kind as one matrix, which has the rows of all."""
        gradient = stacked([gradient_of(name, self.parameters[name]) for name in names])
        gradient = self._widened(gradient)
        kept = [list(self.moments[name].values()) for name in names]
        by_key = [list(own) for own in zip(*kept, strict=True)]
        wide = [self.keeper.read(own) for own in by_key]
        moments = [stacked(own) for own in wide]
        joined = [stack.flatten(0, 1) for stack in moments]
        update = self.negative_update(names[0], gradient.flatten(0, 1), joined, step)
        for own, values, stack in zip(by_key, wide, moments, strict=True):
            put_back_(values, stack)
            self.keeper.write(own, values, step)
        self.apply_stack_(names, update.unflatten(0, gradient.shape[:2]), lr, step)


def row_runs(gradient: Tensor, moments: Sequence[Moment], limit: int) -> list[tuple[slice, list[Moment]]]:
    """Split a gradient and its moments into runs of rows of about ``limit`` elements.

    Each moment has as many rows as the gradient. The runs have a multiple of 64 rows, so that kernels round
    them as they round the whole, and whole blocks of moments in 8 bits.
    """
    if gradient.numel() <= limit:
        return [(ALL_ROWS, list(moments))]
    unit = math.lcm(ROW_UNIT, *(moment.coded.rows_of_block for moment in moments if moment.coded))
    count = max(1, limit // max(1, gradient[:1].numel()) // unit) * unit
    runs = [moment.rows(count * moment.values[:1].numel()) for moment in moments]
    starts = range(0, gradient.shape[0], count)
    return [(slice(start, start + count), list(own)) for start, *own in zip(starts, *runs, strict=True)]
