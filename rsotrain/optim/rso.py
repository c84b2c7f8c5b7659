"""Randomized subspace optimization (RSO: Chen et al., ICML 2025, arXiv 2502.07222).

For each weight W (out × in), rounds k = 0, 1, … of T steps each: draw a random P_k (in × r), and on
f(W + B P_kᵀ) + ‖B‖²/(2η) take T steps of a standard solver in B (out × r) alone, from B = 0, each on a
fresh batch; then W ← W + B P_kᵀ. Here W is effective at all times: each step adds ΔB P_kᵀ to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rsotrain.config import OnRefresh
from rsotrain.models.subspace_linear import Site
from rsotrain.optim.base import Part, Settings, buckets, gradient_of, work_dtype
from rsotrain.optim.inner_solvers import Solver
from rsotrain.optim.subspace_part import Subspace
from rsotrain.subspace.bases import Bases
from rsotrain.subspace.gram import DenseGram
from rsotrain.subspace.projection import add_lifted_
from rsotrain.subspace.samplers import haar

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
    that ends with the draw: the row space of dW = dYᵀX lies in that of X. As those of step 1 need a basis
    too, their first draw is at the end of step 1, and step 1 has a random one. All draws for step t are
    made at the end of step t−1: a checkpoint holds the bases to go on with, and never a Gram matrix.

    The proximal term adds B/η to the gradient, after clipping, and needs B itself: r·out elements more.
    ``refresh_warmup_steps`` n: after a refresh the rate is (s+1)/(n+1) of itself in step s = 0, 1, …, n−1.
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
        )
        for site in sites:
            self._place_first_basis(site)
            for name, layer in site.layers.items():
                self.state[name] = self._initial_state(layer.coefficients)
            self.state[site.name] = self.bases.state[site.name] | self.state[site.name]
        self.buckets = buckets(sites, lambda site: sum(x.coefficients.numel() for x in site.layers.values()))

    def _initial_state(self, coefficients: Tensor) -> dict[str, Tensor]:
        state = {key: self.keeper.zeros(coefficients.shape, coefficients) for key in self.solver.moments}
        state["step"] = torch.zeros((), device=coefficients.device)  # gradients in the moments
        if self.proximal_eta is not None:
            wide = work_dtype(coefficients.dtype)
            state[_COEFFICIENTS] = torch.zeros_like(
                coefficients, dtype=wide, memory_format=torch.contiguous_format
            )
        return state

    def _place_first_basis(self, site: Site) -> None:
        if not self.bases.stored:
            site.regenerate = lambda: self.bases[site.name]
            return
        site.basis = self.bases[site.name]
        if self.bases.informed(1):
            self.bases.place(site.name, haar(self.bases.request(site.name, "start")))
        else:
            self.bases.refresh(site.name, lambda: None, step=1, lr_factor=1.0)

    # --- gradients and inputs ------------------------------------------------------------------

    def gradient_holders(self) -> dict[str, Tensor]:
        return {name: layer.coefficients for site in self.sites for name, layer in site.layers.items()}

    def zero_grad(self) -> None:
        super().zero_grad()
        for site in self.sites:
            site.gram = None

    @contextmanager
    def observing(self, step: int) -> Iterator[None]:
        due = []
        if self.bases.informed(step + 1):
            due = [site for site in self.sites if self._next_draw(site, step) is not None]
        try:
            for site in due:
                site.observing = True
            yield
        finally:
            for site in due:
                site.observing = False

    # --- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        for bucket in self.buckets:
            layers = [(name, layer) for site in bucket for name, layer in site.layers.items()]
            descents = self._descend({name: layer.coefficients for name, layer in layers}, step)
            for site in bucket:
                basis = site.current_basis()
                lr = self.peak_lr * lr_factor * self._rewarmed(site, step)
                for name, layer in site.layers.items():
                    descent = descents[name]
                    add_lifted_(layer.weight, descent, basis, lr, self.kept_share(lr))
                    if self.proximal_eta is not None:
                        self.state[name][_COEFFICIENTS].add_(descent, alpha=lr)
        for site in self.sites:
            index = self._next_draw(site, step)
            if index is not None:
                self._refresh(site, index, step, lr_factor)

    def _descend(self, coefficients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Take dB into the moments; −N by name."""
        states = [self.state[name] for name in coefficients]
        gradients = [gradient_of(name, leaf) for name, leaf in coefficients.items()]
        gradients = [g.to(work_dtype(g.dtype)) for g in gradients]
        if self.proximal_eta is not None:
            values = [state[_COEFFICIENTS] for state in states]
            gradients = list(torch._foreach_add(gradients, values, alpha=1.0 / self.proximal_eta))
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1.0)
        kept = [state[key] for key in self.solver.moments for state in states]
        wide = self.keeper.read(kept)
        moments = [wide[i : i + len(states)] for i in range(0, len(wide), len(states))]
        descents = self.solver.descend(gradients, moments, counts, self.settings)
        self.keeper.write(
            kept, wide, [f"{name}.{key}" for key in self.solver.moments for name in coefficients], step
        )
        return dict(zip(coefficients, descents, strict=True))

    def _rewarmed(self, site: Site, step: int) -> float:
        index, since = self.bases.schedule.latest(self.bases.positions[site.name], step)
        if index == 0:
            return 1.0
        return min(1.0, (since + 1) / (self.refresh_warmup_steps + 1))

    # --- the refresh -----------------------------------------------------------------------------

    def _next_draw(self, site: Site, step: int) -> int | None:
        """Index of the draw at the end of ``step``, for the next one; None: the basis stays."""
        if step == 1 and self.bases.informed(2):
            return 0
        return self.bases.schedule.draw_index(self.bases.positions[site.name], step + 1)

    def _refresh(self, site: Site, index: int, step: int, lr_factor: float) -> None:
        def gram() -> DenseGram | None:
            matrix = site.take_gram()
            return DenseGram(matrix) if bool(matrix.isfinite().all()) else None

        change = self.bases.refresh(site.name, gram, step + 1, lr_factor, index)
        if change is None:
            return
        for name in site.layers:
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
        self.keeper.write(kept, wide, [f"{name}.{key}.transport" for key in self.solver.moments], step)

    # --- books ---------------------------------------------------------------------------------

    def resume(self, step: int) -> None:
        self.bases.resume(step + 1)

    def metrics(self) -> dict[str, float]:
        return self.bases.metrics()

    def describe_rank(self) -> str:
        ranks: Sequence[int] = sorted({site.rank for site in self.sites})
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
