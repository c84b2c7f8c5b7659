"""AdamW at full rank."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.instruments.devices import device_kind
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import buckets
from rsotrain.optim.functional import fused_adamw_
from rsotrain.optim.moments import Moment, work_dtype
from rsotrain.optim.stacks import converted
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.optim.weights import ALL_ROWS, Factors, factors_by_rows, store_all
from rsotrain.parallel.sharding import local

# Elements converted to float32 at a time: on a CPU 4 MiB each for weight and gradient stay in its cache, on a
# GPU as many as one launch of torch's kernels for lists takes, 320 blocks of 65,536
PIECE_ELEMENTS, GPU_PIECE_ELEMENTS = 1 << 20, 320 * 65536
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Piece:
    """The ``rows`` of the parameter ``name``. ``weight`` is a view: writing to it updates the parameter."""

    name: str
    rows: slice
    weight: Tensor
    factors: Factors | None  # of its stochastic rounding on a CPU
    gradient: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment


class AdamW(ParamGroupOptimizer):
    """AdamW with decoupled weight decay; in float32 it equals ``torch.optim.AdamW(fused=True)`` bitwise.

    The fused kernel takes one dtype, so bfloat16 weights, their gradients and bfloat16 moments are copied
    to float32, in pieces that fit the cache.
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
        for name, parameter in parameters.items():
            for key in _MOMENTS:
                self.add_moment(name, key, local(parameter).shape, self.shards[name].dim)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return StateSize((matrix.piece, matrix.piece))

    def joined_keys(self, name: str) -> list[str]:
        return []  # its kernel takes lists

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        # the kernel takes lists of one dtype and device, and one decay
        kinds: dict[tuple[torch.dtype, torch.device, float], list[str]] = {}
        for name in names:
            parameter = self.parameters[name]
            kinds.setdefault((parameter.dtype, parameter.device, self.decay_of(name)), []).append(name)
        for (dtype, device, decay), own in kinds.items():
            count = torch.full((), float(step), device=device)  # made on the device: no copy to wait for
            copies = dtype is not work_dtype(dtype) or self.keeper.reduced
            largest = PIECE_ELEMENTS if device_kind(device) == "cpu" else GPU_PIECE_ELEMENTS
            limit = largest if copies else None
            pieces = [piece for name in own for piece in self._pieces(name, limit, step)]
            groups = buckets(pieces, lambda p: p.weight.numel(), limit) if limit else [pieces]
            for group in groups:
                self._update_group(group, count, step, self.peak_lr * lr_factor, decay)

    def _pieces(self, name: str, limit: int | None, step: int) -> list[_Piece]:
        parameter, moments = self.parameters[name], [self.moments[name][key] for key in _MOMENTS]
        weight, gradient = local(parameter).detach(), gradient_of(name, parameter)
        if limit is None:
            return [_Piece(name, ALL_ROWS, weight, None, gradient, *moments)]
        exp_avgs, exp_avg_sqs = (moment.rows(limit) for moment in moments)
        counts = [run.values.shape[0] for run in exp_avgs]
        whole = self.weights.factors(name, step) if self.weights.in_runs(name) else None
        starts = accumulate(counts, initial=0)
        runs = zip(
            [slice(start, start + count) for start, count in zip(starts, counts, strict=False)],
            weight.split(counts),
            factors_by_rows(whole, counts),
            gradient.split(counts),
            exp_avgs,
            exp_avg_sqs,
            strict=True,
        )
        return [_Piece(name, *run) for run in runs]

    def _update_group(self, pieces: list[_Piece], count: Tensor, step: int, lr: float, decay: float) -> None:
        weights = [p.weight for p in pieces]
        wide = work_dtype(weights[0].dtype)
        moments = [p.exp_avg for p in pieces] + [p.exp_avg_sq for p in pieces]
        on_cpu = self.weights.in_runs(pieces[0].name)
        wide_weights = [w.to(wide) for w in weights] if on_cpu else converted(weights, wide)
        gradients = [p.gradient for p in pieces]
        wide_moments = self.keeper.read(moments)
        fused_adamw_(
            wide_weights,
            [g.to(wide) for g in gradients] if on_cpu else converted(gradients, wide),
            wide_moments[: len(pieces)],
            wide_moments[len(pieces) :],
            [count] * len(pieces),
            lr=lr,
            betas=self.settings.betas,
            eps=self.settings.eps,
            weight_decay=decay,
        )
        if wide is not weights[0].dtype and not on_cpu:
            names, rows = [p.name for p in pieces], [p.rows for p in pieces]
            self.weights.move_all_(names, wide_weights, 1.0, step, kept=0.0, rows=rows)
        elif wide is not weights[0].dtype:
            store_all([(p.weight, p.factors) for p in pieces], wide_weights)
        self.keeper.write(moments, wide_moments, step)
