"""Online PCA of the gradient (OSD: Liang et al., NeurIPS 2024, arXiv 2408.12857)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rsotrain.config.samplers import OnlinePCAConfig, PCASolver
from rsotrain.subspace.gram import Gram
from rsotrain.subspace.orthonormal import orthonormalised
from rsotrain.subspace.samplers import Columns, Sampler, SampleRequest, no_state
from rsotrain.subspace.spectral import svd

BETAS = (0.9, 0.999)
EPS = 1e-8


def pca_gradient(gram: Gram, basis: Tensor, penalty: float) -> Tensor:
    """∇_Q of ‖G̃QQᵀ − G̃‖_F² + λ‖QᵀQ − I‖_F², G̃ = G/‖G‖_F, λ = ``penalty``; ``basis``: k×r float32.

    With H = G̃ᵀG̃ and S = G̃Q it is −2(2HQ − HQ QᵀQ − Q SᵀS) + 4λ Q(QᵀQ − I). As SᵀS = QᵀHQ, it needs only
    products with the Gram matrix.
    """
    energy = gram.energy().clamp(min=torch.finfo(basis.dtype).tiny)
    product = gram.matmul(basis) / energy.to(basis.dtype)[..., None, None]  # HQ
    overlap = basis.mT @ basis  # QᵀQ
    within = 2.0 * (basis.mT @ product) + 4.0 * penalty * overlap
    return 2.0 * (product @ overlap) - 4.0 * product + basis @ within - 4.0 * penalty * basis


def adam_state(size: int, rank: int) -> dict[str, tuple[int, ...]]:
    shape = (size, rank)
    return {"basis_exp_avg": shape, "basis_exp_avg_sq": shape, "basis_step": ()}


def online_pca(
    request: SampleRequest,
    *,
    lr: float,
    penalty: float,
    use_adam: bool,
    orthonormalize: bool,
    weight_decay: float = 0.0,
) -> Tensor:
    """The SVD's basis at the first refresh, then one Adam (or SGD) step on the loss of ``pca_gradient``.

    From step 2 on, the basis takes this step after the update of the weights. Step 1 has none, since its
    basis is optimal for its gradient.
    """
    if request.previous is None:
        return svd(request)
    assert request.gram is not None
    basis = request.previous.float()
    update = -pca_gradient(request.gram, basis, penalty)
    if use_adam and request.batched:
        update = _adam_negative_updates(-update, request.gram.usable, request.states)
    elif use_adam:
        (state,) = request.states
        state["basis_step"] += 1.0
        moments = state["basis_exp_avg"], state["basis_exp_avg_sq"]
        update = _adam_negative_update(-update, *moments, state["basis_step"])
    rate = lr * request.lr_factor
    basis = torch.add(basis * (1.0 - rate * weight_decay), update, alpha=rate)
    return orthonormalised(basis) if orthonormalize else basis


def _adam_negative_update(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> Tensor:
    """−M̂ / (√V̂ + ε), by torch's fused AdamW on zeros with a rate of 1; updates the moments."""
    update = torch.zeros_like(gradient)
    torch._fused_adamw_(
        [update], [gradient], [exp_avg], [exp_avg_sq], [], [step], lr=1.0, beta1=BETAS[0], beta2=BETAS[1],
        weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip
    return update


def _adam_negative_updates(gradients: Tensor, usable: Tensor, states: Sequence[dict[str, Tensor]]) -> Tensor:
    """The same of a batch, by the equations; where ``usable`` (n) is False the moments stay as they are."""
    beta1, beta2 = BETAS
    exp_avgs, exp_avg_sqs, steps = (
        [state[key] for state in states] for key in ("basis_exp_avg", "basis_exp_avg_sq", "basis_step")
    )
    mask = usable[:, None, None]
    old_mean, old_square, count = torch.stack(exp_avgs), torch.stack(exp_avg_sqs), torch.stack(steps)
    count += usable
    mean = torch.lerp(old_mean, gradients, 1.0 - beta1).where(mask, old_mean)
    square = (old_square * beta2).addcmul_(gradients, gradients, value=1.0 - beta2).where(mask, old_square)
    for kept, new in ((exp_avgs, mean), (exp_avg_sqs, square), (steps, count)):
        torch._foreach_copy_(kept, list(new.unbind()))
    wide = count.double()[:, None, None]
    corrections = (1.0 - beta1**wide).float(), (1.0 - beta2**wide).sqrt().float()
    return mean.div_(-corrections[0]).div_(square.sqrt_().div_(corrections[1]).add_(EPS))


def online_pca_sampler(config: OnlinePCAConfig) -> Sampler:
    use_adam = config.solver is PCASolver.adam
    return Sampler(
        config.name,
        partial(
            online_pca,
            lr=config.lr,
            penalty=config.penalty,
            use_adam=use_adam,
            orthonormalize=config.orthonormalize,
            weight_decay=config.weight_decay or 0.0,
        ),
        Columns.orthonormal if config.orthonormalize else Columns.unit,
        informed=True,
        post_update=True,
        by_products=True,
        hint="set sampler.orthonormalize=true",
        state_shapes=adam_state if use_adam else no_state,
    )
