"""Randomized subspace optimization (RSO: Chen et al., ICML 2025, arXiv 2502.07222).

For each weight W (out × in), round k = 0, 1, … samples a random P_k (in × r) and minimises
f(W + B P_kᵀ) + ‖B‖²/(2η) over B (out × r) alone: T (update_proj_gap) steps of a standard solver from B = 0,
each on a fresh batch. Then W ← W + B P_kᵀ. This implementation adds each step's ΔB P_kᵀ to W at once.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.choices import BasisStorage
from rsotrain.config.methods import RSOConfig
from rsotrain.instruments.devices import device_kind
from rsotrain.models.subspace_linear import InputGroup, attach_subspace
from rsotrain.optim.base import Settings
from rsotrain.optim.buckets import buckets, chosen
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.norms import norms_of
from rsotrain.optim.parameter_groups import ParameterGroups
from rsotrain.optim.rso_rules import refuse_pair
from rsotrain.optim.solvers import Solver, solver_of
from rsotrain.optim.stacks import stacked
from rsotrain.optim.state_size import StateSize, Weight, WeightsLayout
from rsotrain.optim.with_bases import (
    OptimizerWithBases,
    Subspace,
)
from rsotrain.parallel.row_sums import RowSums
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.batches import bases_on
from rsotrain.subspace.projection import resolve_rank
from rsotrain.subspace.random_bases import haar
from rsotrain.subspace.samplers import Sampler
from rsotrain.subspace.sources import SumSource

_B = "coefficients"  # the name of B in the optimizer state
_SEED_BYTES = 8  # the int64 seed of a regenerated basis


class RSO(OptimizerWithBases):
    """RSO on linears whose backward pass computes dB instead of dW (``rsotrain.models.subspace_linear``).

    RSO always projects the input, and the linears of an input group share P. The optimizer state is 2·r·out
    elements for each linear (adam) and r·in for each input group. W ← (1 − ηλ)W + η·ΔB Pᵀ, with decoupled
    weight decay ηλ. There is no float32 copy of bfloat16 weights (``rsotrain.optim.weights``).

    With ``basis_scale`` orthonormal bases are multiplied by √(in/r). For a random basis E[PPᵀ] = I then, and
    E‖dB‖² = ‖dW‖². The norm that is logged and clipped (``gradient_norms``) estimates the norm of the full
    gradient, so that ``grad_clip`` means the same for all methods. Without ``basis_scale`` it is the norm of
    the gradient's projection on the subspace.

    Data-dependent samplers use XᵀX of the group's input X, because the row space of dW = dYᵀX lies in that of
    X. Rows of X at padding do not count, since dY is zero there. A refresh for step t happens at the end of
    step t−1, and the forward passes of step t−1 gather XᵀX for it. A checkpoint thus holds the bases for the
    next step, and no Gram matrix. Until the first data-dependent basis, at the end of step 1 (staggered: of
    the step before the group's turn), the basis is random. The Gram matrices (in × in, float32) stay in
    memory from the forward pass to the refresh: those of all groups together, unless refreshes are staggered.

    The proximal term adds B/η to the gradient after clipping and has to keep B: r·out more elements for each
    linear. With ``refresh_warmup_steps`` n, the learning rate after a refresh is multiplied by (s+1)/(n+1) in
    steps s = 0, 1, …, n−1.

    A weight is sharded by its rows, and so are the moments. The only gradient to reduce is dB (out × r).
    """

    replicated_state: ClassVar = frozenset({"step"})
    samples_ahead: ClassVar = True

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: RSOConfig,
        subspace: Subspace,
        *,
        input_groups: list[InputGroup],
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        assert sorted(parameters) == sorted(name for group in input_groups for name in group.layers)
        self.subspace, self.input_groups = subspace, input_groups
        weight = next(iter(parameters.values()))
        self.bases = bases_on(
            device_kind(weight.device),
            {group.name: (group.size, group.rank) for group in input_groups},
            subspace.sampler,
            gap=subspace.gap,
            staggered=subspace.staggered,
            seed=subspace.seed,
            total_steps=subspace.total_steps,
            dtype=subspace.compute_dtype or work_dtype(weight.dtype),
            devices={group.name: parameters[group.name].device for group in input_groups},
            scaled=config.basis_scale and subspace.sampler.orthonormal,
            stored=config.projection is BasisStorage.stored,
            mesh=self.shards[input_groups[0].name].mesh,
        )
        for group in input_groups:
            group.device_kind = device_kind(weight.device)
            self._place_first_basis(group)
            for key, tensor in self.bases.state[group.name].items():
                self.add_tensor(group.name, key, tensor)
            for name, layer in group.layers.items():
                layer.place_leaf()
                self._add_state(name, layer.B)
        self.buckets = buckets(input_groups, lambda group: sum(x.B.numel() for x in group.layers.values()))
        self.layers = {name: layer for group in input_groups for name, layer in group.layers.items()}
        self.row_sums: RowSums | None = None
        self.reduced: dict[str, Tensor] = {}  # this rank's rows of the summed dB
        if self.bases.mesh is not None:
            leaves = [
                {n: x.B for group in bucket for n, x in group.layers.items()} for bucket in self.buckets
            ]
            self.row_sums = RowSums(leaves, self.shards, self.bases.mesh)

    def stack_kind(self, name: str) -> Hashable:
        return super().stack_kind(name), self.layers[name].B.shape[1]

    @property
    def stack_itemsize(self) -> int:
        return self.bases.dtype.itemsize

    @property
    def solver(self) -> Solver:
        return solver_of(self.config.solver)

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        refuse_pair(config, sampler)

    @classmethod
    def prepare_model(
        cls, model: Any, groups: ParameterGroups, config: Any
    ) -> tuple[ParameterGroups, dict[str, Any]]:
        """Replace the linears of ``groups.blocks`` by subspace linears, which read the same weights."""
        assert isinstance(model, nn.Module), "RSO replaces modules, so it needs the model itself"
        return groups, {"input_groups": attach_subspace(model, list(groups.blocks), config.rank)}

    @classmethod
    def state_bytes_formula(cls, config: Any, weights: Sequence[Weight], layout: WeightsLayout) -> int:
        """For each linear its moments (2r·out for Adam) and a count; for each input group r·in for P."""
        input_groups: dict[str, list[Weight]] = {}
        for weight in weights:
            input_groups.setdefault(weight.input_group, []).append(weight)
        num_moments = len(solver_of(config.solver).moments)
        layout, total = replace(layout, numbered=False), 0
        for name, members in input_groups.items():
            rank = resolve_rank(config.rank, max(min(w.shape) for w in members), name)
            rows = [layout.piece(w.shape, rows=True)[0] for w in members]
            stored = config.projection is BasisStorage.stored
            B = 0 if config.proximal_eta is None else sum(rows) * rank
            total += 0 if stored else _SEED_BYTES
            total += layout.bytes_of(
                StateSize(
                    moments=tuple((r, rank) for r in rows for _ in range(num_moments)),
                    bases=((members[0].shape[1], rank),) if stored else (),
                    wide=len(members) + B,
                )
            )
        return total

    def units(self) -> list[list[str]]:
        """The linears of an input group share a basis, which a refresh changes for all."""
        return [list(group.layers) for group in self.input_groups]

    def _groups_of(self, names: Collection[str]) -> list[InputGroup]:
        return [group for group in self.input_groups if group.name in names]

    def _num_rows(self, name: str) -> int:
        shard = self.shards[name]
        assert shard.dim in (None, 0), "RSO projects the second dimension"
        return shard.shape[0] if shard.dim is None else shard.stop - shard.start

    def _add_state(self, name: str, B: Tensor) -> None:
        shape = (self._num_rows(name), B.shape[1])
        for key in self.solver.moments:
            self.add_moment(name, key, shape, 0)
        # the number of gradients in the moments
        self.add_tensor(name, "step", torch.zeros((), device=B.device))
        if self.config.proximal_eta is not None:
            wide = work_dtype(B.dtype)
            self.add_tensor(name, _B, torch.zeros(shape, dtype=wide, device=B.device), 0)

    def _place_first_basis(self, group: InputGroup) -> None:
        if not self.bases.stored:
            group.regenerate = partial(self.bases.__getitem__, group.name)
            return
        group.basis = self.bases[group.name]
        if group.basis.is_meta:  # random numbers come from the CPU, which takes seconds for a large model
            return
        if self.bases.informed(1):
            self.bases.place(group.name, haar(self.bases.request(group.name, "start")))
        else:
            self.bases.refresh(group.name, lambda: None, step=1, lr_factor=1.0)

    # --- gradients and inputs ------------------------------------------------------------------

    def gradient_holders(self) -> dict[str, Tensor]:
        return {name: layer.B for group in self.input_groups for name, layer in group.layers.items()}

    def reduce_gradients(self) -> None:
        """Sum dB over ranks: a reduce-scatter for each bucket and micro-batch, within its backward pass."""
        if self.row_sums is not None:
            self.reduced = self.row_sums.finish()

    def gradients(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        if self.row_sums is None:
            return super().gradients(names)
        return self.reduced if names is None else {name: self.reduced[name] for name in names}

    def partial_gradients(self) -> Iterator[Tensor]:
        return super().partial_gradients() if self.row_sums is None else self.row_sums.tensors()

    def gradient_norms(self, step: int, names: Collection[str] | None = None) -> list[Tensor]:
        """Norms that estimate the norm of the full gradient dW from dB.

        With a scaled basis ‖dB‖ = √(in/r)·‖dW Q‖. A random Q captures r/in of the energy of dW, for which the
        scale √(in/r) compensates. A data-dependent Q captures nearly all of it, so the scale is divided out;
        ‖dW Q‖ never exceeds ‖dW‖.
        """
        gradients = self.gradients(names)
        by_weight: dict[float, list[Tensor]] = {}  # matrices have few shapes, so there are few weights
        for group in self._groups_of(gradients):
            weight = self._column_weights(group, step)
            for name in group.layers:
                if isinstance(weight, float):
                    by_weight.setdefault(weight, []).append(gradients[name])
                else:
                    by_weight.setdefault(1.0, []).append(gradients[name] * weight)
        norms: list[Tensor] = []
        for weight, own in by_weight.items():
            norms += norms_of(own) if weight == 1.0 else torch._foreach_mul(norms_of(own), weight)
        return norms

    def _column_weights(self, group: InputGroup, step: int) -> float | Tensor:
        """The weight of dB in the norm of the gradient: a number for all columns, or one for each."""
        bases = self.bases
        has_seen_data = step > max(1, bases.schedule.offset(bases.positions[group.name]))
        if not bases.scaled or not bases.informed(step) or not has_seen_data:
            return 1.0
        if bases.sampler.column_scales is not None:  # E[PPᵀ] = I, so E‖dB‖² = ‖dW‖²
            return 1.0
        size, rank, scale = group.size, group.rank, (group.size / group.rank) ** 0.5
        informed = bases.sampler.num_informed(rank)
        if informed == rank:
            return 1.0 / scale
        # the other columns are uniformly random in the orthogonal complement of the informed ones
        complement = ((size - informed) / (rank - informed)) ** 0.5 / scale
        weights = torch.full((rank,), complement, device=self.parameters[group.name].device)
        weights[:informed] = 1.0 / scale
        return weights.to(self.parameters[group.name].dtype)

    def zero_grad(self) -> None:
        super().zero_grad()
        self.reduced = {}
        if self.row_sums is not None:
            self.row_sums.clear()
        for group in self.input_groups:
            group.gram = None

    @contextmanager
    def observing(self, step: int, valid_mask: Tensor | None) -> Iterator[None]:
        due = []
        if self.bases.informed(step + 1):
            due = [group for group in self.input_groups if self._next_refresh(group, step) is not None]
        try:
            for group in due:
                group.start_observing(valid_mask)
            yield
        finally:
            for group in due:
                group.observing, group.valid_mask = False, None

    # --- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        groups, gradients = self._groups_of(names), self.gradients(names)
        if self.in_stacks:
            self._update_stacks(gradients, step, self.peak_lr * lr_factor)
        else:
            for bucket in chosen(self.buckets, {group.name for group in groups}, lambda group: group.name):
                self._update_bucket(bucket, gradients, step, self.peak_lr * lr_factor)
        due = {group: i for group in groups if (i := self._next_refresh(group, step)) is not None}
        if due:
            self.refresh(due, step, lr_factor)

    def _update_bucket(
        self, bucket: list[InputGroup], gradients: dict[str, Tensor], step: int, lr: float
    ) -> None:
        own = [name for group in bucket for name in group.layers]
        updates = self._negative_updates({name: gradients[name] for name in own}, step)
        for group in bucket:
            basis, rate = group.current_basis(), lr * self._rewarmed(group, step)
            for name in group.layers:
                self.apply_lifted_(name, updates[name], basis, rate, step)
                if self.config.proximal_eta is not None:
                    self.state[name][_B].add_(updates[name], alpha=rate)

    def _update_stacks(self, gradients: dict[str, Tensor], step: int, lr: float) -> None:
        """The same of weights of one shape together, whichever their inputs are."""
        groups = {name: group for group in self.input_groups for name in group.layers}
        for names in chosen(self.stacks, gradients):
            stack = stacked([gradients[name] for name in names])
            wide = stack.to(work_dtype(stack.dtype)).unbind()
            updates = self._negative_updates(dict(zip(names, wide, strict=True)), step)
            rates: dict[float, list[str]] = {}  # they differ in the warm-up after staggered refreshes
            for name in names:
                rates.setdefault(lr * self._rewarmed(groups[name], step), []).append(name)
            for rate, own in rates.items():
                changes = [updates[name] for name in own]
                drawn = {group.name: group.current_basis() for group in {groups[name] for name in own}}
                bases = stacked([drawn[groups[name].name] for name in own])
                self.apply_lifted_stack_(own, stacked(changes), bases, rate, step)
                if self.config.proximal_eta is not None:
                    torch._foreach_add_([self.state[name][_B] for name in own], changes, alpha=rate)

    def _negative_updates(self, gradients_of: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Update the moments by dB; return −N by parameter name."""
        states = [self.state[name] for name in gradients_of]
        gradients = [g.to(work_dtype(g.dtype)) for g in gradients_of.values()]
        if self.config.proximal_eta is not None:
            values = [state[_B] for state in states]
            gradients = list(torch._foreach_add(gradients, values, alpha=1.0 / self.config.proximal_eta))
        kept = [self.moments[name] for name in gradients_of]
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1.0)
        updates = self.solver.negative_updates(gradients, kept, counts, self.settings, step)
        return dict(zip(gradients_of, updates, strict=True))

    def _rewarmed(self, group: InputGroup, step: int) -> float:
        index, since = self.bases.schedule.latest(self.bases.positions[group.name], step)
        if index == 0:
            return 1.0
        return min(1.0, (since + 1) / (self.config.refresh_warmup_steps + 1))

    # --- the refresh -----------------------------------------------------------------------------

    def _next_refresh(self, group: InputGroup, step: int) -> int | None:
        """Index of the refresh at the end of ``step``, for the next step; None where the basis stays."""
        schedule, position = self.bases.schedule, self.bases.positions[group.name]
        if self.bases.informed(step + 1) and step == max(1, schedule.offset(position)):
            return 0
        return schedule.refresh_index(position, step + 1)

    def refresh(self, due: dict[InputGroup, int], step: int, lr_factor: float) -> None:
        sources = {
            group.name: SumSource(group.take_gram, group.size, shared=self.bases.mesh is not None)
            for group in due
        }
        groups = {group.name: group for group in due}
        for name, change in self.bases.refreshed(
            sources, step + 1, lr_factor, lambda name: due[groups[name]]
        ):
            for layer in groups[name].layers:
                self._basis_changed(layer, change, step)

    def _basis_changed(self, name: str, change: BasisChange, step: int) -> None:
        state = self.state[name]
        if self.config.proximal_eta is not None:
            state[_B].zero_()
        self.solver.basis_changed(
            self.subspace.on_refresh,
            self.moments[name],
            state["step"],
            lambda: change.transition,
            self.settings,
            step,
        )

    # --- metrics and tables --------------------------------------------------------------------

    def refresh_work(self) -> list[tuple[object, str]]:
        """Also gathering XᵀX, in the forward passes of a step that ends with a refresh."""
        return [*super().refresh_work(), *((group, "observe") for group in self.input_groups)]

    def ranks(self) -> list[int]:
        return [group.rank for group in self.input_groups]
