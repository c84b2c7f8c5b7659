"""Update rules as pure functions on local tensors: the equations of the papers, without bookkeeping.

``t`` is the 1-based step, A an oriented gradient (M×k), Q its basis (k×r), R = A Q.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsotrain.instruments.devices import device_kind
from rsotrain.optim.stacks import zeros_alike

Betas = tuple[float, float]


def fused_adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: Betas,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (Loshchilov & Hutter) in one pass over memory, by the fused kernel of torch.optim.AdamW.

    M ← β₁M + (1−β₁)G;  V ← β₂V + (1−β₂)G²;  W ← (1−ηλ)W − η (M/(1−β₁ᵗ)) / (√(V/(1−β₂ᵗ)) + ε).
    All tensors have one dtype. ``steps`` are 0-d float32 and already count this step.
    """
    torch._fused_adamw_(
        list(weights),
        list(gradients),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def adam_negative_updates(
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    betas: Betas,
    eps: float,
) -> list[Tensor]:
    """−N for each gradient, N = M̂ / (√V̂ + ε), by the fused kernel on zero weights with a rate of 1."""
    updates = zeros_alike(gradients)
    fused_adamw_(
        updates, gradients, exp_avgs, exp_avg_sqs, steps, lr=1.0, betas=betas, eps=eps, weight_decay=0.0
    )
    return updates


def transport_momentum_(exp_avg: Tensor, transition: Tensor) -> None:
    """M ← M Cᵀ with C = Q_newᵀ Q_old (r×r), which projects the momentum on the new subspace."""
    exp_avg.copy_(exp_avg.to(transition.dtype) @ transition.T)


def transport_adam_(
    exp_avg: Tensor, exp_avg_sq: Tensor, transition: Tensor, step: Tensor, betas: Betas
) -> None:
    """Projection-aware moments (LDAdam, arXiv 2410.16103, equations of its algorithm 1).

    m̂ ← C m̂;  v̂ ← |C² (v̂ − m̂²) + (C m̂)²|, where C² is elementwise and C as in ``transport_momentum_``.
    ``step`` is the number of gradients in the moments, at least 1.
    """
    count = step.to(torch.float64)
    correction1 = (1.0 - betas[0] ** count).to(exp_avg.dtype)
    correction2 = (1.0 - betas[1] ** count).to(exp_avg.dtype)
    mean = exp_avg / correction1
    variance = (exp_avg_sq / correction2).addcmul_(mean, mean, value=-1.0)
    moved = mean @ transition.T
    exp_avg.copy_(moved * correction1)
    exp_avg_sq.copy_((variance @ transition.square().T).addcmul_(moved, moved).abs_() * correction2)


def channel_scales(update: Tensor, projected: Tensor) -> Tensor:
    """‖N_j‖/‖R_j‖ for each row j, …×M×1; 0 where R_j is 0. ``update``: N or −N, …×M×r; ``projected``: R."""
    norms = torch.linalg.vector_norm(projected, dim=-1, keepdim=True)
    scales = torch.linalg.vector_norm(update, dim=-1, keepdim=True).div_(norms)
    return scales.nan_to_num_(nan=0.0, posinf=0.0)


def limited_growth_(
    norm: Tensor, previous_norm: Tensor, max_growth: float, noise: Tensor | float = 0.0
) -> Tensor:
    """The factor of the norm-growth limiter (Fira, arXiv 2410.01623): ‖U_t‖ ≤ γ‖U_{t−1}‖.

    ``norm``: ‖U_t‖ before limiting, of one matrix or several; ``previous_norm``: ‖U_{t−1}‖, which is
    overwritten by the limited ‖U_t‖; ``max_growth``: γ. Nothing is limited while ``previous_norm`` is at most
    ``noise``, the norm that rounding errors alone may have: growing by γ from there would take thousands of
    steps.
    """
    norm = norm.to(previous_norm.dtype)
    factor = (allowed_norms(previous_norm, max_growth, noise) / norm).clamp_(max=1.0)
    torch.mul(norm, factor, out=previous_norm)
    return factor


def allowed_norms(previous_norm: Tensor, max_growth: float, noise: Tensor | float = 0.0) -> Tensor:
    """γ‖U_{t−1}‖, the largest ‖U_t‖ that the limiter leaves as it is; infinite where nothing is limited."""
    return (max_growth * previous_norm).masked_fill_(previous_norm <= noise, torch.inf)


def row_norms(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of the rows of …×M×k, …×M×1. Sums are in ``dtype``, squares may be in ``piece.dtype``."""
    if piece.is_contiguous() or device_kind(piece.device) == "cuda":
        return torch.linalg.vector_norm(piece, dim=-1, keepdim=True, dtype=dtype)
    # a transposed view, for which torch's norm along the strided dimension takes three times as long on a CPU
    return piece.mT.square().sum(-2, dtype=dtype).sqrt_().unsqueeze(-1)


def subset_sums(gradient: Tensor, subset_size: int) -> Tensor:
    """s = Σ A² over runs of ``subset_size`` entries of a row (SN, arXiv 2411.07120): …×M×(k/subset_size)."""
    if subset_size == 1:
        return gradient.square()
    if gradient.is_contiguous():
        return torch.linalg.vector_norm(gradient.unflatten(-1, (-1, subset_size)), dim=-1).square_()
    return gradient.mT.unflatten(-2, (-1, subset_size)).square().sum(-2).mT  # as in row_norms


def subset_norm_factors_(
    subset_sq: Tensor, sums: Tensor, step: int, betas: Betas, eps: float, *, corrected: bool = True
) -> Tensor:
    """−√(1−β₂ᵗ)/(1−β₁ᵗ) / (√V + ε), after V ← β₂V + (1−β₂)s (SN, arXiv 2411.07120, algorithm 1).

    With β₂ = 1 this is AdaGrad: V ← V + s, without bias correction of V. ``subset_sq``: V; ``sums``: s. Both
    and the result are …×M×(number of subsets in a row). ``corrected``: false leaves both corrections out.
    """
    beta1, beta2 = betas
    if beta2 == 1.0:
        subset_sq.add_(sums)
        correction2 = 1.0
    else:
        subset_sq.lerp_(sums, 1.0 - beta2)
        correction2 = 1.0 - beta2**step
    scale = -(correction2**0.5) / (1.0 - beta1**step) if corrected else -1.0
    return subset_sq.sqrt().add_(eps).reciprocal_().mul_(scale)


def scaled_subsets(numerator: Tensor, factors: Tensor, subsets: Tensor | None = None) -> Tensor:
    """``numerator`` (…×M×k) with each subset of entries multiplied by its factor, in the wider dtype.

    ``subsets``: the subset of each column, where ``numerator`` has only some of the columns; else None.
    """
    if subsets is not None:
        return numerator * factors[..., subsets]
    return (numerator.unflatten(-1, (factors.shape[-1], -1)) * factors.unsqueeze(-1)).flatten(-2)
