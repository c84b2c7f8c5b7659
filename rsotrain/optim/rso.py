"""Randomized subspace optimization (RSO: Chen et al., ICML 2025, arXiv 2502.07222).

For each weight W (out × in), rounds k = 0, 1, … of T steps each: draw a random P_k (in × r), and on
f(W + B P_kᵀ) + ‖B‖²/(2η) take T steps of a standard solver in B (out × r) alone, from B = 0, each on a
fresh batch; then W ← W + B P_kᵀ. Here W is effective at all times: each step adds ΔB P_kᵀ to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OnRefresh
from rsotrain.models.subspace_linear import Site
from rsotrain.optim.base import Part, Settings, buckets, gradient_of, work_dtype
from rsotrain.optim.inner_solvers import Solver
from rsotrain.optim.subspace_part import Subspace
from rsotrain.parallel.sharding import local, reduce_rows
from rsotrain.subspace.bases import Bases, BasisChange
from rsotrain.subspace.projection import add_lifted_
from rsotrain.subspace.samplers import haar
from rsotrain.subspace.sources import SumSource

_COEFFICIENTS = "coefficients"


class RSO(Part):
    """RSO on linears whose backward gives dB and no dW (``rsotrain.models.subspace_linear``).

    It is always the input that is projected, and linears with one input share P: the state is 2·r·out
    elements a linear (adam) and r·in a site. W ← (1 − ηλ)W + η·ΔB Pᵀ, with ηλ the decoupled weight decay.
    With bfloat16 weights this is rounded to nearest, which swallows updates below 2⁻⁹ of an entry: no
    wider copy of W exists.

    Bases: with ``basis_scale`` an orthonormal one is multiplied by √(in/r). Then E[PPᵀ] = I for a random
    one, and E‖dB‖² = ‖dW‖²: the norm that is clipped and logged, that of dB as it is, estimates the full
    gradient's, and one ``grad_clip`` means the same for all methods. Without it the norm of dB is that of
    the gradient's part in the subspace.

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

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        subspace: Subspace,
        *,
        sites: list[Site],
        solver: Solver,
        basis_scale: bool = True,
        proximal_eta: float | None = None,
        refresh_warmup_steps: int = 0,
        stored: bool = True,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings)
        assert sorted(parameters) == sorted(name for site in sites for name in site.layers)
        self.subspace, self.sites, self.solver = subspace, sites, solver
        self.proximal_eta, self.refresh_warmup_steps = proximal_eta, refresh_warmup_steps
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
            scaled=basis_scale and subspace.sampler.orthonormal,
            stored=stored,
            mesh=self.shards[sites[0].name].mesh,
        )
        self.reduced: dict[str, Tensor] = {}  # this rank's rows of dB, where ranks share them
        for site in sites:
            self._place_first_basis(site)
            for name, layer in site.layers.items():
                layer.place_coefficients()
                self.state[name] = self._initial_state(layer.coefficients, self._num_rows(name))
            self.state[site.name] = self.bases.state[site.name] | self.state[site.name]
        self.buckets = buckets(sites, lambda site: sum(x.coefficients.numel() for x in site.layers.values()))

    def _num_rows(self, name: str) -> int:
        shard = self.shards[name]
        assert shard.dim in (None, 0), "RSO projects the second dimension"
        return shard.shape[0] if shard.dim is None else shard.stop - shard.start

    def _initial_state(self, coefficients: Tensor, num_rows: int) -> dict[str, Tensor]:
        shape = (num_rows, coefficients.shape[1])
        state = {key: self.keeper.zeros(shape, coefficients) for key in self.solver.moments}
        state["step"] = torch.zeros((), device=coefficients.device)  # gradients in the moments
        if self.proximal_eta is not None:
            wide = work_dtype(coefficients.dtype)
            state[_COEFFICIENTS] = torch.zeros(shape, dtype=wide, device=coefficients.device)
        return state

    def state_dim(self, name: str, key: str) -> int | None:
        return 0 if key in (*self.solver.moments, _COEFFICIENTS) else None

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

    def zero_grad(self) -> None:
        super().zero_grad()
        self.reduced = {}
        for site in self.sites:
            site.gram = None

    @contextmanager
    def observing(self, step: int, reached: Tensor | None) -> Iterator[None]:
        due = []
        if self.bases.informed(step + 1):
            due = [site for site in self.sites if self._next_draw(site, step) is not None]
        try:
            for site in due:
                site.start_observing(reached)
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
            descents = self._descend({name: gradients[name] for name in names}, step)
            for site in bucket:
                basis = site.current_basis()
                lr = self.peak_lr * lr_factor * self._rewarmed(site, step)
                for name, layer in site.layers.items():
                    descent = descents[name]
                    weight = local(layer.weight).detach()
                    add_lifted_(weight, descent, basis, lr, self.kept_share(lr))
                    if self.proximal_eta is not None:
                        self.state[name][_COEFFICIENTS].add_(descent, alpha=lr)
        due = {site: i for site in self.sites if (i := self._next_draw(site, step)) is not None}
        if due:
            self.refresh(due, step, lr_factor)

    def _descend(self, gradients_of: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Take dB into the moments; −N by name."""
        states = [self.state[name] for name in gradients_of]
        gradients = [g.to(work_dtype(g.dtype)) for g in gradients_of.values()]
        if self.proximal_eta is not None:
            values = [state[_COEFFICIENTS] for state in states]
            gradients = list(torch._foreach_add(gradients, values, alpha=1.0 / self.proximal_eta))
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1.0)
        kept = [state[key] for key in self.solver.moments for state in states]
        wide = self.keeper.read(kept)
        moments = [wide[i : i + len(states)] for i in range(0, len(wide), len(states))]
        descents = self.solver.descend(gradients, moments, counts, self.settings)
        labels = [self._label(name, key) for key in self.solver.moments for name in gradients_of]
        self.keeper.write(kept, wide, labels, step)
        return dict(zip(gradients_of, descents, strict=True))

    def _label(self, name: str, key: str) -> str:
        return f"{name}{self.shards[name].label}.{key}"

    def _rewarmed(self, site: Site, step: int) -> float:
        index, since = self.bases.schedule.latest(self.bases.positions[site.name], step)
        if index == 0:
            return 1.0
        return min(1.0, (since + 1) / (self.refresh_warmup_steps + 1))

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
        if self.proximal_eta is not None:
            state[_COEFFICIENTS].zero_()
        if self.subspace.on_refresh is OnRefresh.reset:
            for key in (*self.solver.moments, "step"):
                state[key].zero_()
        elif self.subspace.on_refresh is OnRefresh.transport:
            self._transport(name, change.transition, step)

    def _transport(self, name: str, transition: Tensor, step: int) -> None:
        state = self.state[name]
        kept = [state[key] for key in self.solver.moments]
        wide = self.keeper.read(kept)
        self.solver.transport(wide, transition, state["step"], self.settings)
        self.keeper.write(
            kept, wide, [self._label(name, f"{key}.transport") for key in self.solver.moments], step
        )

    # --- books ---------------------------------------------------------------------------------

    def begins_round(self, step: int) -> bool:
        return self.bases.schedule.draw_index(0, step) is not None

    def resume(self) -> None:
        self.bases.resume()

    def metrics(self) -> dict[str, float]:
        return self.bases.record.metrics()

    def ranks(self) -> list[int]:
        return [site.rank for site in self.sites]
