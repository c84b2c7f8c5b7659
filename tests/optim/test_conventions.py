"""The authors' own arithmetic where it differs from older runs of ours; each can be chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.one_matrix import BASE, BETAS, EPS, LOW, LR, RANK, SHAPES, build, error_of, gradients, run, start
from torch import Tensor, nn

from rsotrain.config.choices import BiasCorrection, OnRefresh
from rsotrain.config.methods import (
    ApolloConfig,
    FiraConfig,
    GaLoreConfig,
    LDAdamConfig,
    OptimizerConfig,
    SNConfig,
    SNSMConfig,
)
from rsotrain.config.samplers import (
    BlockPowerConfig,
    GaussianConfig,
    NoSamplerConfig,
    OnlinePCAConfig,
    PCASolver,
    SamplerConfig,
    SvdConfig,
)
from rsotrain.errors import UserError
from rsotrain.optim import reference

SVD, NONE = SvdConfig(name="svd"), NoSamplerConfig(name="none")
SCALE = 0.25
ADAM = {"betas": BETAS, "eps": EPS}
LOW_RANK = {"rank": RANK, "gap": 7}


@pytest.mark.parametrize("side", SHAPES)
@pytest.mark.parametrize("at_lr", [True, False])
def test_firas_alpha_scales_the_subspace_alone(side: str, at_lr: bool) -> None:
    config = FiraConfig(name="fira", residual_at_lr=at_lr, scale=SCALE, **(LOW | {"lr": 4 * LR}))

    def theirs(weight: Tensor, grads: list[Tensor]) -> Tensor:
        return reference.galore(
            weight, grads, outside="fira", lr=LR, residual_lr=4 * LR if at_lr else LR, weight_decay=0.1,
            **ADAM, **LOW_RANK,
        )  # fmt: skip

    assert error_of(config, SVD, theirs, SHAPES[side], "fp32") < 1e-4


def test_firas_residual_has_a_rate_at_a_scale_of_zero_only_if_it_is_scaled() -> None:
    config = FiraConfig(name="fira", residual_at_lr=True, scale=0.0, **LOW)
    with pytest.raises(UserError, match="residual_at_lr is for"):
        build(nn.Parameter(start((12, 12))), config, SVD)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (0.0, 0.99), (0.9, 0.99)])
@pytest.mark.parametrize("low_rank", [False, True])
def test_adagrad_and_rmsprop_with_subset_norms_have_no_bias_correction(
    betas: tuple[float, float], low_rank: bool
) -> None:
    own = {"subset_size": None, "bias_correction": BiasCorrection.adam_form}
    shape = SHAPES["right"]
    config: OptimizerConfig = (
        SNSMConfig(name="sn_sm", on_refresh=OnRefresh.reset, **own, **(LOW | {"betas": betas, "lr": 10 * LR}))
        if low_rank
        else SNConfig(name="sn", **own, **(BASE | {"betas": betas, "lr": 10 * LR}))
    )

    def theirs(weight: Tensor, grads: list[Tensor]) -> Tensor:
        return reference.sn_sm(
            weight, grads, lr=10 * LR, betas=betas, eps=EPS, weight_decay=0.1, subset_size=min(shape), gap=7,
            rank=RANK if low_rank else None, corrected=betas == (0.9, 0.99),
        )  # fmt: skip

    assert error_of(config, SVD if low_rank else NONE, theirs, shape, "fp32") < 1e-4


def test_ldadams_first_basis_is_an_svd() -> None:
    config = LDAdamConfig(name="ldadam", **(LOW | {"update_proj_gap": 1, "on_refresh": OnRefresh.transport}))
    sampler = BlockPowerConfig(name="block_power")

    def theirs(weight: Tensor, grads: list[Tensor]) -> Tensor:
        return reference.ldadam(weight, grads, lr=LR, rank=RANK, rho=0.908, weight_decay=0.1, **ADAM)

    for shape in SHAPES.values():
        assert error_of(config, sampler, theirs, shape, "fp32") < 1e-4


@pytest.mark.parametrize("solver", PCASolver)
def test_osd_decays_its_basis(solver: PCASolver) -> None:
    """SGD's decay in torch is part of the gradient, which without momentum is the decoupled one."""
    config = GaLoreConfig(name="osd", **(LOW | {"update_proj_gap": 1, "weight_decay": 0.0}))
    sampler = OnlinePCAConfig(name="online_pca", lr=0.02, solver=solver, weight_decay=0.5)

    def theirs(decay: float) -> Callable[[Tensor, list[Tensor]], Tensor]:
        return lambda weight, grads: reference.osd(
            weight, grads, lr=LR, rank=RANK, basis_lr=0.02, penalty=0.1, basis_decay=decay,
            use_adam=solver is PCASolver.adam, **ADAM,
        )  # fmt: skip

    assert error_of(config, sampler, theirs(0.5), SHAPES["right"], "fp32") < 1e-4
    assert error_of(config, sampler, theirs(0.0), SHAPES["right"], "fp32") > 1e-3


DECAYING: dict[str, tuple[type[OptimizerConfig], SamplerConfig, dict[str, Any]]] = {
    "galore": (GaLoreConfig, SVD, LOW),
    "fira": (FiraConfig, SVD, LOW),
    "apollo": (ApolloConfig, GaussianConfig(name="gaussian"), LOW),
    "sn_sm": (SNSMConfig, SVD, LOW),
}


@pytest.mark.parametrize("method", DECAYING)
def test_weight_decay_at_the_unscaled_rate(method: str) -> None:
    """The authors' codes step at lr·α without decay and then multiply W by 1 − lr·λ."""
    kind, sampler, low = DECAYING[method]
    rate, decay, shape = 4 * LR, 0.1, SHAPES["right"]
    own = low | {"lr": rate, "scale": SCALE}
    parameters = [nn.Parameter(start(shape)) for _ in range(2)]
    ours = build(
        parameters[0], kind(name=method, decay_at_lr=True, **(own | {"weight_decay": decay})), sampler
    )
    plain = build(parameters[1], kind(name=method, **(own | {"weight_decay": 0.0})), sampler)
    initial = start(shape)
    for gradient in gradients(shape):
        run(ours, parameters[0], [gradient])
        run(plain, parameters[1], [gradient])
        parameters[1].data.mul_(1 - rate * decay)
    moved = (parameters[1].data - initial).abs().max()
    # ours decays before the step, theirs after it: a step's lr·λ = 0.4 % of the step
    assert float((parameters[0].data - parameters[1].data).abs().max() / moved) < 0.004 * 1.5
    scaled = nn.Parameter(start(shape))
    run(
        build(scaled, kind(name=method, **(own | {"weight_decay": decay})), sampler), scaled, gradients(shape)
    )
    assert float((scaled.data - parameters[1].data).abs().max() / moved) > 0.01


def test_the_unscaled_rate_needs_a_scale() -> None:
    config = GaLoreConfig(name="galore", decay_at_lr=True, **(LOW | {"scale": 0.0}))
    with pytest.raises(UserError, match="decay_at_lr is for"):
        build(nn.Parameter(torch.zeros(12, 12)), config, SVD)
