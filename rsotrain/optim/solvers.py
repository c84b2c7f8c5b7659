"""Update rules inside a subspace: they take gradients g and return negative updates −N.

For GaLore and the methods derived from it g is R = A Q (M×r), for RSO it is dB (out×r). C = Q_newᵀ Q_old
(r×r) is the transition to a new basis. A solver sees g alone, neither bases nor weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsotrain.config.choices import InnerSolver, OnRefresh
from rsotrain.optim.functional import adam_negative_updates, transport_adam_, transport_momentum_
from rsotrain.optim.moments import Moment

if TYPE_CHECKING:
    from rsotrain.optim.base import Settings


@dataclass(frozen=True)
class Solver:
    """``moments``: names of the solver's state tensors, each of g's shape.

    ``rule(gradients, moments, counts, settings)`` updates the moments (one list for each name) by the
    gradients, which it may overwrite, and returns −N. ``counts``: the number of gradients in the moments of
    each matrix, this one included, 0-d. ``carry(moments, transition, count, settings)`` transports the
    moments of one matrix to a new basis.
    """

    moments: tuple[str, ...]
    rule: Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]], Sequence[Tensor], "Settings"], list[Tensor]]
    carry: Callable[[Sequence[Tensor], Tensor, Tensor, "Settings"], None]

    def negative_updates(
        self,
        gradients: Sequence[Tensor],
        kept: Sequence[Mapping[str, Moment]],
        counts: Sequence[Tensor],
        settings: "Settings",
        step: int,
    ) -> list[Tensor]:
        """Update the moments of several matrices by their gradients; return −N of each.

        ``counts``: the number of gradients in the moments of each matrix, these included.
        """
        moments = [own[key] for key in self.moments for own in kept]
        wide = settings.keeper.read(moments)
        by_name = [wide[i : i + len(kept)] for i in range(0, len(wide), len(kept))]
        updates = self.rule(gradients, by_name, counts, settings)
        settings.keeper.write(moments, wide, step)
        return updates

    def basis_changed(
        self,
        on_refresh: OnRefresh,
        kept: Mapping[str, Moment],
        count: Tensor,
        transition: Callable[[], Tensor],
        settings: "Settings",
        step: int,
    ) -> None:
        """Keep the moments of one matrix, zero them and their count, or transport them to the new basis."""
        moments = [kept[key] for key in self.moments]
        if on_refresh is OnRefresh.reset:
            for moment in moments:
                moment.zero_()
            count.zero_()
        elif on_refresh is OnRefresh.transport:
            wide = settings.keeper.read(moments)
            self.carry(wide, transition(), count, settings)
            settings.keeper.write(moments, wide, step, "transport")


def _adam(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: "Settings",
) -> list[Tensor]:
    """N = M̂ / (√V̂ + ε)."""
    exp_avgs, exp_avg_sqs = moments
    return adam_negative_updates(
        gradients, exp_avgs, exp_avg_sqs, counts, betas=settings.betas, eps=settings.eps
    )


def _plain_adam(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: "Settings",
) -> list[Tensor]:
    """N = M / (√V + ε): Adam without bias correction, which is gone where β^∞ is 0."""
    exp_avgs, exp_avg_sqs = moments
    endless = [torch.full_like(counts[0], torch.inf)] * len(counts)
    return adam_negative_updates(
        gradients, exp_avgs, exp_avg_sqs, endless, betas=settings.betas, eps=settings.eps
    )


def _carry_adam(moments: Sequence[Tensor], transition: Tensor, count: Tensor, settings: "Settings") -> None:
    exp_avg, exp_avg_sq = moments
    transport_adam_(exp_avg, exp_avg_sq, transition, count, settings.betas)


def _momentum(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: "Settings",
) -> list[Tensor]:
    """M ← β₁M + (1−β₁)g;  N = M/(1−β₁ᵗ). With β₁ = 0 this is gradient descent."""
    beta1 = settings.betas[0]
    (exp_avgs,) = moments
    for exp_avg, gradient in zip(exp_avgs, gradients, strict=True):
        exp_avg.lerp_(gradient, 1.0 - beta1)
    corrections = [beta1 ** count.to(torch.float64) - 1.0 for count in counts]
    return [m / correction.to(m.dtype) for m, correction in zip(exp_avgs, corrections, strict=True)]


def _carry_momentum(
    moments: Sequence[Tensor], transition: Tensor, count: Tensor, settings: "Settings"
) -> None:
    transport_momentum_(moments[0], transition)


def _adagrad(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: "Settings",
) -> list[Tensor]:
    """V ← V + g²;  N = g / (√V + ε) (Duchi et al., 2011)."""
    (sums,) = moments
    for total, gradient in zip(sums, gradients, strict=True):
        total.addcmul_(gradient, gradient)
    return [-g / total.sqrt().add_(settings.eps) for g, total in zip(gradients, sums, strict=True)]


def _carry_adagrad(
    moments: Sequence[Tensor], transition: Tensor, count: Tensor, settings: "Settings"
) -> None:
    """V ← C² V with C² elementwise, exact for the sums of squares of uncorrelated coordinates of g."""
    moments[0].copy_(moments[0] @ transition.square().T)


SOLVERS: dict[InnerSolver, Solver] = {
    InnerSolver.adam: Solver(("exp_avg", "exp_avg_sq"), _adam, _carry_adam),
    InnerSolver.momentum: Solver(("exp_avg",), _momentum, _carry_momentum),
    InnerSolver.adagrad: Solver(("sum_sq",), _adagrad, _carry_adagrad),
}


PLAIN_ADAM = replace(SOLVERS[InnerSolver.adam], rule=_plain_adam)


def solver_of(chosen: InnerSolver) -> Solver:
    assert chosen in SOLVERS, f"optimizer.solver={chosen.name} has no rule: add it to SOLVERS in {__file__}"
    return SOLVERS[chosen]
