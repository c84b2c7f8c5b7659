"""Limits in which a method must equal another, known one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh, StateDtype
from rsotrain.config.methods import (
    AdamConfig,
    AliceConfig,
    ApolloConfig,
    FiraConfig,
    FrugalConfig,
    GaLoreConfig,
    MuonConfig,
    OptimizerConfig,
    OrbitConfig,
    SNConfig,
    SNSMConfig,
    SubspaceConfig,
    SumoConfig,
)
from rsotrain.config.samplers import (
    CoordinateConfig,
    GaussianConfig,
    HaarConfig,
    ImportanceConfig,
    NoSamplerConfig,
    OnlinePCAConfig,
    SamplerConfig,
    SvdConfig,
)
from rsotrain.config.schema import Precision
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.functional import limited_growth_, subset_sums
from rsotrain.optim.residuals import Apollo

FULL, STEPS = 8, 15
SHAPES = [(12, FULL), (FULL, 12), (FULL, FULL)]
SVD = SvdConfig(name="svd")
NONE = NoSamplerConfig(name="none")


def run(
    config: OptimizerConfig,
    sampler: SamplerConfig,
    shape: tuple[int, int],
    steps: int = STEPS,
) -> Tensor:
    """The weight after ``steps`` random gradients, float32."""
    random = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape, generator=random))
    optimizer = build_optimizer([("w", parameter)], config, sampler, seed=1, total_steps=steps)
    for _ in range(steps):
        parameter.grad = torch.randn(shape, generator=random)
        optimizer.step()
    return parameter.data


def close(first: Tensor, second: Tensor) -> bool:
    # Entries move by about 0.1. Products of 8 to 12 terms err by some 1e-7 of a row's size; divided by the
    # second moment of an entry a hundredth of that size this is 1e-5 of a step's 0.01, in 15 steps; the
    # smallest of 12·8·15 gradient entries is about a thousandth.
    return bool((first - second).abs().max() < 1e-4)


def low(kind: type[SubspaceConfig], **own: object) -> SubspaceConfig:
    settings = {"name": "x", "lr": 0.01, "rank": FULL, "update_proj_gap": 1000, "block_parameters": ["w"]}
    return kind(**(settings | own))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_subspace_momentum_at_full_rank_is_momentum_at_full_rank(shape: tuple[int, int]) -> None:
    own = {"subset_size": 1, "betas": (0.9, 0.99)}
    full = SNConfig(name="sn", lr=0.01, block_parameters=["w"], **own)
    kept = low(SNSMConfig, **own)
    assert close(run(kept, SVD, shape), run(full, NONE, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_at_full_rank_survives_transport_to_any_basis(shape: tuple[int, int]) -> None:
    own = {"subset_size": None, "betas": (0.9, 0.99)}
    full = SNConfig(name="sn", lr=0.1, block_parameters=["w"], **own)
    moved = low(SNSMConfig, lr=0.1, update_proj_gap=4, on_refresh=OnRefresh.transport, **own)
    assert close(run(moved, HaarConfig(name="haar"), shape), run(full, NONE, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_subset_size_one_has_adams_denominator(shape: tuple[int, int]) -> None:
    # Its ε is inside the bias correction, Adam's outside: with ε = 1e-30 that is no difference.
    own = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-30, "block_parameters": ["w"]}
    sn = SNConfig(name="sn", subset_size=1, **own)
    assert close(run(sn, NONE, shape), run(AdamConfig(name="adam", **own), NONE, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_on_all_axes_is_adam(shape: tuple[int, int]) -> None:
    adam = AdamConfig(name="adam", lr=0.01, block_parameters=["w"])
    for gap in (1000, 4):
        galore = low(GaLoreConfig, update_proj_gap=gap)
        assert close(run(galore, CoordinateConfig(name="coordinate"), shape), run(adam, NONE, shape))


@pytest.mark.parametrize("kind", [FiraConfig, FrugalConfig])
def test_nothing_is_outside_a_full_subspace(kind: type[SubspaceConfig]) -> None:
    shape = (12, FULL)
    assert torch.equal(run(low(kind), SVD, shape), run(low(GaLoreConfig), SVD, shape))


def test_momentum_free_subspace_is_plain_sgd() -> None:
    """β₁ = 0 and one subset whose V is the sum of squares: normalised SGD of every row, in any basis."""
    own = {"betas": (0.0, 0.0), "eps": 1e-30}
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(12, FULL, generator=random)
    for _ in range(STEPS):
        gradient = torch.randn(12, FULL, generator=random)
        weight = weight - 0.01 * gradient / gradient.norm(dim=1, keepdim=True)
    for rank in (3, FULL):
        assert close(run(low(SNSMConfig, rank=rank, **own), SVD, (12, FULL)), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_osd_that_never_steps_its_basis_is_galore_that_never_refreshes(shape: tuple[int, int]) -> None:
    frozen = run(
        low(GaLoreConfig, rank=3, update_proj_gap=1),
        OnlinePCAConfig(name="online_pca", lr=0.0),
        shape,
    )
    assert torch.equal(frozen, run(low(GaLoreConfig, rank=3), SVD, shape))


def test_i3s_at_full_rank_is_galore_at_full_rank() -> None:
    i3s = run(low(GaLoreConfig, update_proj_gap=5), ImportanceConfig(name="importance"), (12, FULL))
    assert close(i3s, run(low(GaLoreConfig, update_proj_gap=5), SVD, (12, FULL)))


def test_transport_at_a_full_basis_change_and_back_restores_the_moments() -> None:
    from rsotrain.optim.functional import transport_momentum_

    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=random))[0]
    momentum = torch.randn(4, 6, generator=random)
    moved = momentum.clone()
    transport_momentum_(moved, basis)
    transport_momentum_(moved, basis.T)
    assert bool((moved - momentum).abs().max() < 1e-5)


def test_apollo_scales_rows_as_full_rank_adam_would() -> None:
    """On all axes with one gradient, N is ±1 everywhere: each row gets length √k."""
    weight = nn.Parameter(torch.zeros(12, FULL))
    config = low(ApolloConfig, lr=1.0)
    optimizer = build_optimizer(
        [("w", weight)], config, CoordinateConfig(name="coordinate"), seed=0, total_steps=1
    )
    weight.grad = torch.randn(12, FULL, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.allclose(weight.data.norm(dim=1), torch.full((12,), FULL**0.5), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(-weight.data, weight.grad, dim=1)
    assert torch.allclose(cosine, torch.ones(12))


def test_norm_growth_is_limited_after_the_first_update() -> None:
    previous = torch.zeros(())
    factors = [float(limited_growth_(torch.tensor(norm), previous, 1.01)) for norm in (3.0, 6.0, 1.5)]
    assert factors[0] == 1.0
    assert factors[1] == pytest.approx(1.01 / 2)
    assert factors[2] == 1.0  # shrinking is free
    assert float(previous) == pytest.approx(1.5)


def test_subset_sums_add_up_to_the_squared_norm() -> None:
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).T  # a transposed view
    assert torch.allclose(subset_sums(gradient, 6), gradient.square().sum(1, keepdim=True))
    assert torch.allclose(subset_sums(gradient, 2).sum(), gradient.square().sum())
    assert torch.allclose(subset_sums(gradient, 1), gradient.square())


def inside(shape: tuple[int, int], rank: int, random: torch.Generator) -> Tensor:
    """A gradient of rank ``rank``: nothing of it is outside its dominant subspace."""
    rows, columns = shape
    left = torch.randn(rows, rank, generator=random)
    return left @ torch.randn(rank, columns, generator=random)


@pytest.mark.parametrize("shape", SHAPES)
def test_frugal_takes_no_signs_of_rounding_errors(shape: tuple[int, int]) -> None:
    gradient = inside(shape, 3, torch.Generator().manual_seed(0))
    weights = []
    for kind in (FrugalConfig, GaLoreConfig):
        parameter = nn.Parameter(torch.zeros(shape))
        optimizer = build_optimizer([("w", parameter)], low(kind, rank=3), SVD, seed=1, total_steps=2)
        parameter.grad = gradient
        optimizer.step()
        weights.append(parameter.data)
    assert torch.allclose(*weights, rtol=0, atol=1e-6)  # a sign would be 0.01


def test_firas_residual_is_not_held_at_the_size_of_rounding_errors() -> None:
    random = torch.Generator().manual_seed(0)
    shape = SHAPES[0]
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = build_optimizer([("w", parameter)], low(FiraConfig, rank=3), SVD, seed=1, total_steps=3)
    parameter.grad = inside(shape, 3, random)
    optimizer.step()
    assert float(optimizer.state_dict()["w.residual_norm"]) < 1e-4
    parameter.grad = torch.randn(shape, generator=random)
    optimizer.step()
    assert float(optimizer.state_dict()["w.residual_norm"]) > 0.1


def test_a_missing_gradient_stops_the_step_before_anything_changes() -> None:
    parameters = [nn.Parameter(torch.ones(12, FULL)) for _ in range(2)]
    config = low(GaLoreConfig, rank=3, block_parameters=["a"])
    optimizer = build_optimizer(list(zip("ab", parameters, strict=True)), config, SVD, seed=1, total_steps=3)
    parameters[0].grad = torch.ones(12, FULL)
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    with pytest.raises(RuntimeError, match="b has no gradient"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_dict().items())
    assert torch.equal(parameters[0].data, torch.ones(12, FULL))


@pytest.mark.parametrize("kind", ["adam", "galore", "apollo", "fira", "frugal", "sn", "sn_sm", "muon"])
def test_weight_decay_reaches_bfloat16_weights(kind: str) -> None:
    """0.1 % a step is less than half a unit of bfloat16: lost if rounded before the update is added."""
    own = {"lr": 0.02, "weight_decay": 0.05, "block_parameters": ["w"], "name": kind}
    low_rank = own | {"rank": FULL // 2, "update_proj_gap": 1000}
    config, sampler = {
        "adam": (AdamConfig(**own), NONE),
        "muon": (MuonConfig(**own), NONE),
        "sn": (SNConfig(**own), NONE),
        "galore": (GaLoreConfig(**low_rank), SVD),
        "fira": (FiraConfig(**low_rank), SVD),
        "frugal": (FrugalConfig(**low_rank), SVD),
        "apollo": (ApolloConfig(**low_rank), GaussianConfig(name="gaussian")),
        "sn_sm": (SNSMConfig(**low_rank), SVD),
    }[kind]
    random = torch.Generator().manual_seed(0)
    start = 1.05 + 0.9 * torch.rand(32, FULL, generator=random)
    moved = []
    for decay in (0.05, 0.0):
        config.weight_decay = decay
        parameter = nn.Parameter(start.bfloat16())
        optimizer = build_optimizer(
            [("w", parameter)], config, sampler, precision=Precision.bf16, seed=1, total_steps=60
        )
        noise = torch.Generator().manual_seed(1)
        for _ in range(60):
            parameter.grad = torch.randn(32, FULL, generator=noise).bfloat16()
            optimizer.step()
        moved.append(parameter.data.float().mean())
    # 60 steps of 0.1 % of 1.5 are 0.09; rounding to nearest keeps what the updates' own size lets through
    assert float(moved[1] - moved[0]) > 0.03


@pytest.mark.parametrize("kind", [GaLoreConfig, SNSMConfig])
def test_bfloat16_second_moment_decays_as_in_float32(kind: type[SubspaceConfig]) -> None:
    """Rounded to nearest, V·0.999 is V in bfloat16 and a large first V would stay for ever."""
    moments = {}
    for dtype in StateDtype:
        parameter = nn.Parameter(torch.zeros(12, FULL))
        config = low(kind, rank=FULL // 2, state_dtype=dtype)
        optimizer = build_optimizer([("w", parameter)], config, SVD, seed=1, total_steps=1500)
        random = torch.Generator().manual_seed(0)
        for step in range(1500):
            parameter.grad = torch.randn(12, FULL, generator=random) * (100.0 if step == 0 else 1.0)
            optimizer.step()
        key = "w.exp_avg_sq" if kind is GaLoreConfig else "w.subset_sq"
        moments[dtype] = optimizer.state_dict()[key].double()
    full, reduced = moments[StateDtype.float32], moments[StateDtype.bfloat16]
    # each write errs by up to 2⁻⁸, about 1000 of them count: 2⁻⁸ √1000 / √3 = 7 %, twice that at most here
    assert float((reduced / full).log().abs().mean()) < 0.14
    assert abs(float((reduced / full).mean()) - 1.0) < 0.05


def test_updates_of_bfloat16_weights_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded once, when they are added to the weight; also where one factor scales the whole."""
    dtypes: list[torch.dtype] = []
    apply = Apollo.apply_

    def seen(self: Apollo, name: str, update: Tensor, *more: Any) -> None:
        dtypes.append(update.dtype)
        apply(self, name, update, *more)

    monkeypatch.setattr(Apollo, "apply_", seen)
    for per_tensor in (False, True):
        parameter = nn.Parameter(torch.randn(12, FULL).bfloat16())
        config = low(ApolloConfig, rank=1, per_tensor=per_tensor)
        optimizer = build_optimizer(
            [("w", parameter)], config, GaussianConfig(name="gaussian"), seed=1, total_steps=1
        )
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert dtypes == [torch.float32, torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
def test_alice_at_full_rank_on_all_axes_is_adam_without_bias_correction(shape: tuple[int, int]) -> None:
    """There is no residual; on the axes neither tracking nor a refresh turns anything."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random)
    m = v = torch.zeros(shape)
    for _ in range(STEPS):
        gradient = torch.randn(shape, generator=random)
        m, v = 0.9 * m + 0.1 * gradient, 0.9 * v + 0.1 * gradient**2
        weight = weight - 0.01 * m / v.sqrt()
    alice = low(AliceConfig, update_proj_gap=4)
    assert close(run(alice, CoordinateConfig(name="coordinate"), shape), weight)


def test_alice_leaves_residuals_of_rounding_errors_out() -> None:
    """A gradient of rank 3 is all in its dominant subspace; divided by their own norm, errors would be 1."""
    gradient = inside(SHAPES[0], 3, torch.Generator().manual_seed(0))
    weights = []
    for compensation in (0.4, 0.0):
        parameter = nn.Parameter(torch.zeros(SHAPES[0]))
        config = low(AliceConfig, rank=3, compensation=compensation)
        optimizer = build_optimizer([("w", parameter)], config, SVD, seed=1, total_steps=2)
        parameter.grad = gradient
        optimizer.step()
        weights.append(parameter.data)
    assert torch.allclose(*weights, rtol=0, atol=1e-6)


def test_what_alice_remembers_draws_the_subspace() -> None:
    """One gradient that is small and elsewhere does not turn the leading directions of a hundred others."""
    random = torch.Generator().manual_seed(0)
    steady = inside((12, FULL), 1, random)
    other = inside((12, FULL), 1, random) * 2
    overlaps = []
    for tracking in (0.99, 0.0):
        parameter = nn.Parameter(torch.zeros(12, FULL))
        config = low(AliceConfig, rank=1, update_proj_gap=100, tracking=tracking)
        optimizer = build_optimizer([("w", parameter)], config, SVD, seed=1, total_steps=101)
        for step in range(101):
            parameter.grad = other if step == 100 else steady
            optimizer.step()
        direction = torch.linalg.svd(steady)[2][0]
        overlaps.append(float((optimizer.state_dict()["w.basis"][:, 0] @ direction).abs()))
    assert overlaps[0] > 0.99
    assert overlaps[1] < 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_orbit_with_groups_of_one_row_divides_the_residual_by_its_rows_rms(shape: tuple[int, int]) -> None:
    """The polynomial takes the one singular value of a row, 1, to 0.70; without the subspace's part."""
    ns = 1.0
    for _ in range(5):
        ns = 3.4445 * ns - 4.775 * ns**3 + 2.0315 * ns**5
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    moved = []
    for free_scale in (1.0, 0.0):
        parameter = nn.Parameter(torch.zeros(shape))
        config = low(OrbitConfig, rank=3, group=1, free_scale=free_scale)
        optimizer = build_optimizer([("w", parameter)], config, SVD, seed=1, total_steps=2)
        parameter.grad = gradient.clone()
        optimizer.step()
        moved.append(parameter.data.clone())
    oriented = gradient if shape[0] >= shape[1] else gradient.T
    left, values, right = torch.linalg.svd(oriented, full_matrices=False)
    residual = (left[:, 3:] * values[3:]) @ right[3:]
    wanted = -0.01 * ns * residual / residual.square().mean(1, keepdim=True).sqrt()
    difference = moved[0] - moved[1]
    assert torch.allclose(difference if shape[0] >= shape[1] else difference.T, wanted, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_orbit_takes_no_step_along_rounding_errors(precision: torch.dtype) -> None:
    """A gradient inside the subspace has a residual of rounding errors; O is as large as of any other."""
    moved = []
    for kind in (OrbitConfig, GaLoreConfig):
        parameter = nn.Parameter(torch.zeros(24, FULL, dtype=precision))
        optimizer = build_optimizer([("w", parameter)], low(kind, rank=4), SVD, seed=1, total_steps=2)
        parameter.grad = inside((24, FULL), 3, torch.Generator().manual_seed(0)).to(precision)
        optimizer.step()
        moved.append(parameter.data.clone())
    assert torch.equal(*moved)


@pytest.mark.parametrize("shape", SHAPES)
def test_sumo_at_full_rank_is_orthogonalised_momentum(shape: tuple[int, int]) -> None:
    """In any basis, and whatever the refreshes, which carry the momentum over."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random)
    momentum = torch.zeros(shape)
    for _ in range(STEPS):
        momentum = 0.95 * momentum + 0.05 * torch.randn(shape, generator=random)
        left, _, right = torch.linalg.svd(momentum, full_matrices=False)
        weight = weight - 0.01 * 0.2 * max(shape) ** 0.5 * left @ right
    for sampler in (HaarConfig(name="haar"), SVD):
        sumo = low(SumoConfig, update_proj_gap=4, on_refresh=OnRefresh.transport)
        assert close(run(sumo, sampler, shape), weight)


def test_sumo_leaves_directions_without_momentum_alone() -> None:
    parameter = nn.Parameter(torch.zeros(12, FULL))
    optimizer = build_optimizer([("w", parameter)], low(SumoConfig), SVD, seed=1, total_steps=2)
    parameter.grad = inside((12, FULL), 3, torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(parameter.data)
    assert torch.allclose(values[:3], torch.full((3,), 0.01 * 0.2 * 12**0.5), rtol=1e-4)
    assert bool((values[3:] < 1e-7).all())
