"""Randomized subspace optimization (RSO: Chen et al., ICML 2025, arXiv 2502.07222).

For each weight W (out × in), rounds k = 0, 1, … of T steps each: draw a random P_k (in × r), and on
f(W + B P_kᵀ) + ‖B‖²/(2η) take T steps of a standard solver in B (out × r) alone, from B = 0, each on a
fresh batch; then W ← W + B P_kᵀ. Here W is effective at all times: each step adds ΔB P_kᵀ to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import BasisStorage, RSOConfig
from rsotrain.errors import require
from rsotrain.models.subspace_linear import Site, attach_subspace
from rsotrain.optim.base import Settings, buckets, gradient_of
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.norms import norms_of
from rsotrain.optim.parameter_groups import ParameterGroups
from rsotrain.optim.solvers import Solver, solver_of
from rsotrain.optim.state_size import StateSize, Weight, WeightsLayout
from rsotrain.optim.with_bases import (
    OptimizerWithBases,
    Subspace,
    pair,
    require_orthonormal,
    require_sampler,
)
from rsotrain.parallel.sharding import local, reduce_rows
from rsotrain.subspace.bases import Bases, BasisChange
from rsotrain.subspace.projection import add_lifted_, resolve_rank
from rsotrain.subspace.random_bases import haar
from rsotrain.subspace.samplers import Columns, Sampler
from rsotrain.subspace.sources import SumSource

_COEFFICIENTS = "coefficients"
_SEED_BYTES = 8  # of a basis that is sampled again from its seed, int64


class RSO(OptimizerWithBases):
    """RSO on linears whose backward gives dB and no dW (``rsotrain.models.subspace_linear``).

    It is always the input that is projected, and linears with one input share P: the state is 2·r·out
    elements a linear (adam) and r·in a site. W ← (1 − ηλ)W + η·ΔB Pᵀ, with ηλ the decoupled weight decay.
    With bfloat16 weights this is rounded to nearest, which swallows updates below 2⁻⁹ of an entry: no
    wider copy of W exists.

    Bases: with ``basis_scale`` an orthonormal one is multiplied by √(in/r). Then E[PPᵀ] = I for a random
    one, and E‖dB‖² = ‖dW‖². The norm that is logged and clipped (``gradient_norms``) estimates the full
    gradient's, so that one ``grad_clip`` means the same for all methods; without ``basis_scale`` it is that
    of the gradient's part in the subspace.

    Samplers that look at data see XᵀX of the site's input, as gathered by the forward passes of the step
    that ends with the draw: the row space of dW = dYᵀX lies in that of X, of which the rows do not count
    where dY is zero, those of padding. As those of step 1 need a basis too, their first draw is at the end
    of step 1 (staggered: of the step before their turn), and until then they have a random one. All draws
    for step t are made at the end of step t−1: a checkpoint holds the bases to go on with, and never a Gram
    matrix. Those in use, in × in in float32, are held from the forward pass to the draw, all together unless
    the draws are staggered.

    The proximal term adds B/η to the gradient, after clipping, and needs B itself: r·out elements more.
    ``refresh_warmup_steps`` n: after a refresh the rate is (s+1)/(n+1) of itself in step s = 0, 1, …, n−1.

    Sharded, a weight is split by its rows, and so are B's moments: dB, out × r, is all that is reduced.
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
        sites: list[Site],
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        assert sorted(parameters) == sorted(name for site in sites for name in site.layers)
        self.subspace, self.sites = subspace, sites
        weight = next(iter(parameters.values()))
        self.bases = Bases(
            {site.name: (site.size, site.rank) for site in sites},
            subspace.sampler,
            gap=subspace.gap,
            staggered=subspace.staggered,
            seed=subspace.seed,
            total_steps=subspace.total_steps,
            dtype=subspace.compute_dtype or work_dtype(weight.dtype),
            devices={site.name: parameters[site.name].device for site in sites},
            scaled=config.basis_scale and subspace.sampler.orthonormal,
            stored=config.projection is BasisStorage.stored,
            mesh=self.shards[sites[0].name].mesh,
        )
        self.reduced: dict[str, Tensor] = {}  # this rank's rows of dB, where ranks share them
        for site in sites:
            self._place_first_basis(site)
            for key, tensor in self.bases.state[site.name].items():
                self.add_tensor(site.name, key, tensor)
            for name, layer in site.layers.items():
                layer.place_coefficients()
                self._add_state(name, layer.coefficients)
        self.buckets = buckets(sites, lambda site: sum(x.coefficients.numel() for x in site.layers.values()))

    @property
    def solver(self) -> Solver:
        return solver_of(self.config.solver)

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        sampler = require_sampler(config, sampler)
        both, scaled = pair(config, sampler), sampler.columns is Columns.scaled
        require(
            sampler.orthonormal or scaled,
            f"{both}: RSO needs bases of a known scale, which this sampler's are not; {sampler.hint}",
        )
        require(
            config.basis_scale or not scaled,
            f"{both}: these bases are scaled already, so optimizer.basis_scale=false would do nothing;"
            " leave it true or use sampler=haar",
        )
        require(
            not sampler.needs_gradient,
            f"{both}: sampler.solver=full decomposes the gradient, which RSO never forms;"
            " use sampler.solver=gram",
        )
        require(
            config.projection is BasisStorage.stored or not sampler.informed,
            f"{both}: these bases depend on data, which cannot be regenerated from a seed;"
            " use optimizer.projection=stored, or a random sampler such as haar",
        )
        eta, warmup = config.proximal_eta, config.refresh_warmup_steps
        require(eta is None or eta > 0, f"optimizer.proximal_eta={eta} must be positive, or null for no term")
        require(
            0 <= warmup < config.update_proj_gap,
            f"optimizer.refresh_warmup_steps={warmup} must be at least 0 and less than"
            f" optimizer.update_proj_gap={config.update_proj_gap}",
        )
        require_orthonormal(config, sampler, always=False)

    @classmethod
    def prepare_model(
        cls, model: Any, groups: ParameterGroups, config: Any
    ) -> tuple[ParameterGroups, dict[str, Any]]:
        """Replace the linears of ``groups.blocks`` by subspace linears, which read the same weights."""
        assert isinstance(model, nn.Module), "RSO replaces modules, so it needs the model itself"
        return groups, {"sites": attach_subspace(model, list(groups.blocks), config.rank)}

    @classmethod
    def state_bytes_formula(cls, config: Any, weights: Sequence[Weight], layout: WeightsLayout) -> int:
        """Of each linear 2r·out for Adam and a count, of each input that linears share r·in for P."""
        sites: dict[str, list[Weight]] = {}
        for weight in weights:
            sites.setdefault(weight.site, []).append(weight)
        num_moments = len(solver_of(config.solver).moments)
        total = 0
        for name, members in sites.items():
            rank = resolve_rank(config.rank, max(min(w.shape) for w in members), name)
            rows = [layout.piece(w.shape, rows=True)[0] for w in members]
            stored = config.projection is BasisStorage.stored
            coefficients = 0 if config.proximal_eta is None else sum(rows) * rank
            total += 0 if stored else _SEED_BYTES
            total += layout.bytes_of(
                StateSize(
                    moments=tuple((r, rank) for r in rows for _ in range(num_moments)),
                    bases=((members[0].shape[1], rank),) if stored else (),
                    wide=len(members) + coefficients,
                )
            )
        return total

    def _num_rows(self, name: str) -> int:
        shard = self.shards[name]
        assert shard.dim in (None, 0), "RSO projects the second dimension"
        return shard.shape[0] if shard.dim is None else shard.stop - shard.start

    def _add_state(self, name: str, coefficients: Tensor) -> None:
        shape = (self._num_rows(name), coefficients.shape[1])
        for key in self.solver.moments:
            self.add_moment(name, key, shape, 0)
        # gradients in the moments
        self.add_tensor(name, "step", torch.zeros((), device=coefficients.device))
        if self.config.proximal_eta is not None:
            wide = work_dtype(coefficients.dtype)
            self.add_tensor(
                name, _COEFFICIENTS, torch.zeros(shape, dtype=wide, device=coefficients.device), 0
            )

    def _place_first_basis(self, site: Site) -> None:
        if not self.bases.stored:
            site.regenerate = partial(self.bases.__getitem__, site.name)
            return
        site.basis = self.bases[site.name]
        if site.basis.is_meta:  # random numbers are drawn on the CPU: seconds for a large model
            return
        if self.bases.informed(1):
            self.bases.place(site.name, haar(self.bases.request(site.name, "start")))
        else:
            self.bases.refresh(site.name, lambda: None, step=1, lr_factor=1.0)

    # --- gradients and inputs ------------------------------------------------------------------

    def gradient_holders(self) -> dict[str, Tensor]:
        return {name: layer.coefficients for site in self.sites for name, layer in site.layers.items()}

    def reduce_gradients(self) -> None:
        """Sum dB over ranks: one reduce-scatter of a bucket's dB, and one all-reduce between replicas."""
        if self.bases.mesh is None:
            return
        for bucket in self.buckets:
            layers = {name: layer for site in bucket for name, layer in site.layers.items()}
            gradients = {name: gradient_of(name, layer.coefficients) for name, layer in layers.items()}
            self.reduced |= reduce_rows(gradients, self.shards, self.bases.mesh)
            for layer in layers.values():
                layer.coefficients.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() if self.bases.mesh is None else self.reduced

    def gradient_norms(self, step: int) -> list[Tensor]:
        """Of the full gradient, as far as dB tells it.

        ‖dB‖ = √(in/r)·‖dW Q‖ with the scaled basis. A random Q holds r/in of the energy of dW, which the
        scale makes good. A Q that was chosen by the data holds nearly all of it, so there the scale is taken
        out again, and ‖dW Q‖ never exceeds ‖dW‖.
        """
        gradients = self.gradients()
        by_weight: dict[float, list[Tensor]] = {}  # few shapes, so few weights
        for site in self.sites:
            weight = self._column_weights(site, step)
            for name in site.layers:
                if isinstance(weight, float):
                    by_weight.setdefault(weight, []).append(gradients[name])
                else:
                    by_weight.setdefault(1.0, []).append(gradients[name] * weight)
        norms: list[Tensor] = []
        for weight, own in by_weight.items():
            norms += norms_of(own) if weight == 1.0 else torch._foreach_mul(norms_of(own), weight)
        return norms

    def _column_weights(self, site: Site, step: int) -> float | Tensor:
        """By what the columns of dB count in the norm of the gradient: all alike, or a weight for each."""
        bases = self.bases
        has_seen_data = step > max(1, bases.schedule.offset(bases.positions[site.name]))
        if not bases.scaled or not bases.informed(step) or not has_seen_data:
            return 1.0
        size, rank, scale = site.size, site.rank, (site.size / site.rank) ** 0.5
        informed = bases.sampler.num_informed(rank)
        if informed == rank:
            return 1.0 / scale
        # the others are uniformly random in the complement of the informed ones
        complement = ((size - informed) / (rank - informed)) ** 0.5 / scale
        weights = torch.full((rank,), complement, device=self.parameters[site.name].device)
        weights[:informed] = 1.0 / scale
        return weights.to(self.parameters[site.name].dtype)

    def zero_grad(self) -> None:
        super().zero_grad()
        self.reduced = {}
        for site in self.sites:
            site.gram = None

    @contextmanager
    def observing(self, step: int, valid_mask: Tensor | None) -> Iterator[None]:
        due = []
        if self.bases.informed(step + 1):
            due = [site for site in self.sites if self._next_draw(site, step) is not None]
        try:
            for site in due:
                site.start_observing(valid_mask)
            yield
        finally:
            for site in due:
                site.observing, site.reached = False, None

    # --- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        gradients = self.gradients()
        for bucket in self.buckets:
            names = [name for site in bucket for name in site.layers]
            updates = self._negative_updates({name: gradients[name] for name in names}, step)
            for site in bucket:
                basis = site.current_basis()
                lr = self.peak_lr * lr_factor * self._rewarmed(site, step)
                for name, layer in site.layers.items():
                    weight = local(layer.weight).detach()
                    add_lifted_(weight, updates[name], basis, lr, self.decay_factor(lr))
                    if self.config.proximal_eta is not None:
                        self.state[name][_COEFFICIENTS].add_(updates[name], alpha=lr)
        due = {site: i for site in self.sites if (i := self._next_draw(site, step)) is not None}
        if due:
            self.refresh(due, step, lr_factor)

    def _negative_updates(self, gradients_of: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Take dB into the moments; −N by name."""
        states = [self.state[name] for name in gradients_of]
        gradients = [g.to(work_dtype(g.dtype)) for g in gradients_of.values()]
        if self.config.proximal_eta is not None:
            values = [state[_COEFFICIENTS] for state in states]
            gradients = list(torch._foreach_add(gradients, values, alpha=1.0 / self.config.proximal_eta))
        kept = [self.moments[name] for name in gradients_of]
        counts = [state["step"] for state in states]
        updates = self.solver.negative_updates(gradients, kept, counts, self.settings, step)
        return dict(zip(gradients_of, updates, strict=True))

    def _rewarmed(self, site: Site, step: int) -> float:
        index, since = self.bases.schedule.latest(self.bases.positions[site.name], step)
        if index == 0:
            return 1.0
        return min(1.0, (since + 1) / (self.config.refresh_warmup_steps + 1))

    # --- the refresh -----------------------------------------------------------------------------

    def _next_draw(self, site: Site, step: int) -> int | None:
        """Index of the draw at the end of ``step``, for the next one; None: the basis stays."""
        schedule, position = self.bases.schedule, self.bases.positions[site.name]
        if self.bases.informed(step + 1) and step == max(1, schedule.offset(position)):
            return 0
        return schedule.draw_index(position, step + 1)

    def refresh(self, due: dict[Site, int], step: int, lr_factor: float) -> None:
        sources = {
            site.name: SumSource(site.take_gram, site.size, shared=self.bases.mesh is not None)
            for site in due
        }
        indices = {site.name: index for site, index in due.items()}
        changes = self.bases.refresh_all(sources, step + 1, lr_factor, indices.__getitem__)
        for site in due:
            if site.name in changes:
                for name in site.layers:
                    self._basis_changed(name, changes[site.name], step)

    def _basis_changed(self, name: str, change: BasisChange, step: int) -> None:
        state = self.state[name]
        if self.config.proximal_eta is not None:
            state[_COEFFICIENTS].zero_()
        self.solver.basis_changed(
            self.subspace.on_refresh,
            self.moments[name],
            state["step"],
            lambda: change.transition,
            self.settings,
            step,
        )

    # --- books ---------------------------------------------------------------------------------

    def refresh_work(self) -> list[tuple[object, str]]:
        """And XᵀX, gathered in the forward passes of a step that ends with new bases."""
        return [*super().refresh_work(), *((site, "observe") for site in self.sites)]

    def ranks(self) -> list[int]:
        return [site.rank for site in self.sites]
