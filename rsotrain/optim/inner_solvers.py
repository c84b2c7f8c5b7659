"""The solvers of RSO's subproblem: gradients of B in, descents −N of B out.

``g`` is dB (out × r), C = P_newᵀ P_old (r × r) the transition to a new basis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsotrain.optim.base import Settings
from rsotrain.optim.functional import adam_descent, transport_adam_, transport_momentum_


@dataclass(frozen=True)
class Solver:
    """``moments``: names of its out × r state tensors.

    ``descend(gradients, moments, counts, settings)`` takes the gradients, which it may overwrite, into the
    moments (one list for each name) and returns −N; ``counts`` are 0-d and count this gradient.
    ``transport(moments, transition, count, settings)`` re-expresses the moments of one matrix.
    """

    moments: tuple[str, ...]
    descend: Callable[
        [Sequence[Tensor], Sequence[Sequence[Tensor]], Sequence[Tensor], Settings], list[Tensor]
    ]
    transport: Callable[[Sequence[Tensor], Tensor, Tensor, Settings], None]


def _adam_descend(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: Settings,
) -> list[Tensor]:
    """N = M̂ / (√V̂ + ε)."""
    exp_avgs, exp_avg_sqs = moments
    return adam_descent(gradients, exp_avgs, exp_avg_sqs, counts, betas=settings.betas, eps=settings.eps)


def _adam_transport(moments: Sequence[Tensor], transition: Tensor, count: Tensor, settings: Settings) -> None:
    exp_avg, exp_avg_sq = moments
    transport_adam_(exp_avg, exp_avg_sq, transition, count, settings.betas)


def _momentum_descend(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: Settings,
) -> list[Tensor]:
    """M ← β₁M + (1−β₁)g;  N = M/(1−β₁ᵗ): with β₁ = 0 gradient descent."""
    beta1 = settings.betas[0]
    (exp_avgs,) = moments
    for exp_avg, gradient in zip(exp_avgs, gradients, strict=True):
        exp_avg.lerp_(gradient, 1.0 - beta1)
    corrections = [beta1 ** count.to(torch.float64) - 1.0 for count in counts]
    return [m / correction.to(m.dtype) for m, correction in zip(exp_avgs, corrections, strict=True)]


def _momentum_transport(
    moments: Sequence[Tensor], transition: Tensor, count: Tensor, settings: Settings
) -> None:
    transport_momentum_(moments[0], transition)


def _adagrad_descend(
    gradients: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    counts: Sequence[Tensor],
    settings: Settings,
) -> list[Tensor]:
    """V ← V + g²;  N = g / (√V + ε) (Duchi et al., 2011)."""
    (sums,) = moments
    for total, gradient in zip(sums, gradients, strict=True):
        total.addcmul_(gradient, gradient)
    return [-g / total.sqrt().add_(settings.eps) for g, total in zip(gradients, sums, strict=True)]


def _adagrad_transport(
    moments: Sequence[Tensor], transition: Tensor, count: Tensor, settings: Settings
) -> None:
    """V ← C² V, C² elementwise: the sums of squares if the coordinates of g were uncorrelated."""
    moments[0].copy_(moments[0] @ transition.square().T)


ADAM = Solver(("exp_avg", "exp_avg_sq"), _adam_descend, _adam_transport)
MOMENTUM = Solver(("exp_avg",), _momentum_descend, _momentum_transport)
ADAGRAD = Solver(("sum_sq",), _adagrad_descend, _adagrad_transport)
