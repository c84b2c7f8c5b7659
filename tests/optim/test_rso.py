"""RSO against its float64 transcription and its limits; the function at a refresh, every sampler, resume."""

import copy

import pytest
import torch
from helpers.rso_toy import (
    BETAS,
    EPS,
    GAP,
    HAAR,
    IN,
    LR,
    OUT,
    RANK,
    SAMPLERS,
    SCALE,
    STEPS,
    SVD,
    TOKENS,
    Toy,
    batch,
    build,
    config,
    train,
)
from helpers.runs import PRECISIONS
from torch import Tensor, nn

from rsotrain.config.choices import BasisStorage, InnerSolver, OnRefresh, StateDtype
from rsotrain.config.samplers import SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.models.layers import Linear
from rsotrain.optim import reference
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.rso import RSO
from rsotrain.subspace.random_bases import haar
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator

# --- one linear against the transcription ----------------------------------------------------------


class One(nn.Module):
    shared_inputs = (("w",),)

    def __init__(self, out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = Linear(IN, out)
        self.w.weight.data = torch.randn(out, IN, generator=torch.Generator().manual_seed(2)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


def output_gradient(t: int, y: Tensor) -> Tensor:
    """Of ½‖y − target_t‖²/tokens."""
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(t)).to(y.dtype)
    return (y - target) / TOKENS


def seeded(t: int, x: Tensor, rank: int, old: Tensor | None) -> Tensor:
    """The basis that the haar sampler samples for step t."""
    random = generator(0, "basis", "w.weight", (t - 1) // GAP)
    return haar(SampleRequest(IN, rank, None, random, torch.device("cpu"))).double()


def seeded_then_dominant(t: int, x: Tensor, rank: int, old: Tensor | None) -> Tensor:
    """The random start of an informed sampler, then the principal axes of the last step's input."""
    if old is None:
        return haar(
            SampleRequest(IN, rank, None, generator(0, "basis", "w.weight", "start"), torch.device("cpu"))
        ).double()
    return reference.dominant(t, x, rank, old if t > 2 else None)


CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "adam": ({}, {}),
    "adam-keep": ({"on_refresh": OnRefresh.keep}, {"on_refresh": "keep"}),
    "adam-transport": ({"on_refresh": OnRefresh.transport}, {"on_refresh": "transport"}),
    "momentum": ({"solver": InnerSolver.momentum}, {"solver": "momentum"}),
    "momentum-transport": (
        {"solver": InnerSolver.momentum, "on_refresh": OnRefresh.transport},
        {"solver": "momentum", "on_refresh": "transport"},
    ),
    "adagrad": ({"solver": InnerSolver.adagrad}, {"solver": "adagrad"}),
    "adagrad-transport": (
        {"solver": InnerSolver.adagrad, "on_refresh": OnRefresh.transport},
        {"solver": "adagrad", "on_refresh": "transport"},
    ),
    "proximal": ({"proximal_eta": 0.05}, {"proximal_eta": 0.05}),
    "decay": ({"weight_decay": 0.3}, {"weight_decay": 0.3}),
    "re-warmed": ({"refresh_warmup_steps": 3}, {"refresh_warmup_steps": 3}),
    "unscaled": ({"basis_scale": False}, {"basis_scale": 1.0}),
}  # fmt: skip

# Largest difference of an entry after 30 steps over the largest change of one. Ours in float64 samples its
# bases in float32 as the reference does: what is left is rounding of 1e-16, enlarged where Adam divides by
# a small gradient. float32: as in test_optim_reference.py.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def one_linear(
    own: dict[str, object], sampler: SamplerConfig, dtype: torch.dtype, out: int
) -> tuple[Tensor, Tensor]:
    """(weight before, weight after STEPS steps), float64."""
    model = One(out, dtype)
    before = model.w.weight.data.double().clone()
    optimizer = build(model, config(block_parameters=["w"], **own), sampler)
    for t in range(1, STEPS + 1):
        with optimizer.observing():
            y = model(batch(t, dtype))
        y.backward(output_gradient(t, y.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return before, model.w.weight.data.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("out", [OUT, 8], ids=["wide", "narrow"])
@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_equal_the_reference(case: str, out: int, dtype: torch.dtype) -> None:
    own, theirs = CASES[case]
    before, after = one_linear(own, HAAR, dtype, out)
    common = {"lr": LR, "rank": RANK, "gap": GAP, "betas": BETAS, "eps": EPS, "basis_scale": SCALE}
    inputs = [batch(t, dtype) for t in range(1, STEPS + 1)]
    expected = reference.rso(before, inputs, output_gradient, sample=seeded, **(common | theirs))  # type: ignore[arg-type]
    moved = (expected - before).abs().max()
    assert moved > LR
    assert (after - expected).abs().max() < TOLERANCE[dtype] * moved


@pytest.mark.parametrize("case", ["adam-transport", "momentum"])
def test_reduced_precision_follows_the_reference(case: str) -> None:
    """bf16_mixed: float32 weights; inputs, bases, products and ΔB Pᵀ before it is added in bfloat16."""
    own, theirs = CASES[case]
    model = One(OUT, torch.float32)
    before = model.w.weight.data.double().clone()
    optimizer = build(model, config(block_parameters=["w"], **own), precision=Precision.bf16_mixed)
    for t in range(1, STEPS + 1):
        y = model(batch(t, torch.bfloat16))
        y.backward(output_gradient(t, y.detach()))
        optimizer.step()
        optimizer.zero_grad()
    common = {"lr": LR, "rank": RANK, "gap": GAP, "betas": BETAS, "eps": EPS, "basis_scale": SCALE}
    inputs = [batch(t) for t in range(1, STEPS + 1)]
    expected = reference.rso(before, inputs, output_gradient, sample=seeded, **(common | theirs))  # type: ignore[arg-type]
    # each operand has 8 bits, an error of 2e-3, which Adam's division enlarges in small entries
    error = (model.w.weight.data.double() - expected).abs().max()
    assert error < 0.05 * (expected - before).abs().max()


def test_informed_bases_are_those_of_the_last_steps_inputs() -> None:
    # T = 1: the random start serves step 1, the principal axes of step t−1's input every later one. The
    # axes come from a float32 Gram matrix of singular values 0.7^i, whose gaps enlarge its rounding to
    # some 1e-5.
    own = {"update_proj_gap": 1, "on_refresh": OnRefresh.transport}
    before, after = one_linear(own, SVD, torch.float64, OUT)
    expected = reference.rso(
        before, [batch(t) for t in range(1, STEPS + 1)], output_gradient, sample=seeded_then_dominant, lr=LR,
        rank=RANK, gap=1, betas=BETAS, eps=EPS, basis_scale=SCALE, on_refresh="transport",
    )  # fmt: skip
    assert (after - expected).abs().max() < 1e-3 * (expected - before).abs().max()


def test_at_full_rank_gradient_descent_in_b_is_gradient_descent() -> None:
    # P orthogonal: ΔB Pᵀ = −η (dW P) Pᵀ = −η dW, whatever the bases, refreshes and proximal-free rules.
    own = {
        "rank": IN, "solver": InnerSolver.momentum, "betas": (0.0, 0.99), "basis_scale": False, "lr": 0.1,
    }  # fmt: skip
    before, after = one_linear(own, HAAR, torch.float64, OUT)
    weight = before.clone()
    for t in range(1, STEPS + 1):
        x = batch(t)
        weight -= 0.1 * output_gradient(t, x @ weight.T).T @ x
    # the bases are orthogonal to float32 rounding
    assert (after - weight).abs().max() < 1e-5 * (weight - before).abs().max()
    assert (weight - before).abs().max() > 0.1


# --- the function and the clock --------------------------------------------------------------------


def test_a_refresh_leaves_the_function_as_it_is() -> None:
    model = Toy()
    optimizer = build(model, config())
    train(model, optimizer, range(GAP - 1))
    rso = optimizer.groups[0]
    assert isinstance(rso, RSO)
    seen: list[Tensor] = []

    def refresh(*arguments: object) -> None:
        seen.append(model(batch(0)).detach())
        original(*arguments)  # type: ignore[arg-type]
        seen.append(model(batch(0)).detach())

    original, rso.refresh = rso.refresh, refresh  # type: ignore[method-assign]
    before = copy.deepcopy([group.basis for group in rso.input_groups])
    train(model, optimizer, range(GAP - 1, GAP))
    assert len(seen) == 2  # all input groups are refreshed together
    for output in seen[1:]:
        assert torch.equal(output, seen[0])
    assert not any(torch.equal(old, group.basis) for old, group in zip(before, rso.input_groups, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains_and_micro_batches_equal_one_batch(sampler: str) -> None:
    whole, parts = Toy(), Toy()
    losses = train(whole, build(whole, config(), SAMPLERS[sampler]), range(STEPS))
    train(parts, build(parts, config(), SAMPLERS[sampler]), range(STEPS), micro_batches=4)
    assert losses[-1] < 0.8 * losses[0]
    start = Toy()
    for (name, p), q, s in zip(whole.named_parameters(), parts.parameters(), start.parameters(), strict=True):
        # float64 sums in another order; bases from float32 eigenvectors enlarge it
        assert (p - q).abs().max() < 1e-6 * (p - s).abs().max(), name


@pytest.mark.parametrize("on_refresh", OnRefresh)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sampler", ["haar", "svd", "randomized_svd", "regenerated", "online_pca"])
def test_a_resumed_run_is_the_uninterrupted_run_bitwise(
    sampler: str, precision: Precision, on_refresh: OnRefresh
) -> None:
    own = {"on_refresh": on_refresh, "staggered": True, "proximal_eta": 1.0, "refresh_warmup_steps": 2}
    if sampler == "regenerated":
        own |= {"projection": BasisStorage.regenerated, "state_dtype": StateDtype.bfloat16}
    chosen = SAMPLERS.get(sampler, HAAR)
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32

    def fresh() -> tuple[nn.Module, CompositeOptimizer]:
        model = Reduced(dtype) if precision is Precision.bf16_mixed else Toy(dtype)
        return model, build(model, config(**own), chosen, precision=precision)

    model, optimizer = fresh()
    saved = {}
    for t in range(2 * GAP + 2):
        if t in (1, GAP - 1, GAP, GAP + 3):  # around the refreshes, and between them
            saved[t] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, range(t, t + 1))
    for t, (weights, state) in saved.items():
        other, resumed = fresh()
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(other, resumed, range(t, 2 * GAP + 2))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        for key, value in optimizer.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_run_that_goes_on_with_other_settings_keeps_its_bases_until_the_next_refresh() -> None:
    """Moments, and the B of the proximal term, mean nothing in another basis."""
    found = []
    for projection in BasisStorage:
        own = {"projection": projection, "proximal_eta": 0.1}
        model = Toy()
        optimizer = build(model, config(**own))
        train(model, optimizer, range(GAP + 1))
        weights, state = model.state_dict(), optimizer.state_dict()
        model = Toy()
        optimizer = build(model, config(**own, update_proj_gap=2), seed=1)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(GAP + 1, GAP + 5))
        found.append(model)
    for p, q in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert torch.equal(p, q)


class Reduced(Toy):
    """float32 weights, bfloat16 activations."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16))


@pytest.mark.parametrize("on_refresh", OnRefresh)
@pytest.mark.parametrize("sampler", ["haar", "gaussian", "coordinate", "srht"])
def test_regenerated_bases_are_the_stored_ones_bitwise(sampler: str, on_refresh: OnRefresh) -> None:
    if sampler == "gaussian" and on_refresh is OnRefresh.transport:
        pytest.skip("transport needs orthonormal bases")
    models = []
    for projection in BasisStorage:
        model = Toy()
        settings = config(projection=projection, on_refresh=on_refresh, staggered=True)
        optimizer = build(model, settings, SAMPLERS[sampler])
        train(model, optimizer, range(STEPS))
        models.append(model)
        held = [key for key in optimizer.state_dict() if key.endswith(".basis")]
        assert len(held) == (2 if projection is BasisStorage.stored else 0)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
