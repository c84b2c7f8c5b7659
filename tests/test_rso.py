"""RSO against its float64 transcription, its limits, its state and its refusals."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rsotrain import config as c
from rsotrain.errors import UserError
from rsotrain.models.llama import Linear, apply_shared
from rsotrain.models.subspace_linear import SubspaceLinear
from rsotrain.optim import reference
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.rso import RSO
from rsotrain.subspace.gram import DenseGram
from rsotrain.subspace.samplers import Draw, haar, mixture
from rsotrain.subspace.seeding import generator

IN, OUT, MIDDLE, TOKENS = 12, 16, 10, 40
RANK, GAP, STEPS, LR = 4, 7, 30, 0.01
BETAS, EPS = (0.9, 0.99), 1e-8
SCALE = (IN / RANK) ** 0.5
HAAR, SVD = c.HaarConfig(name="haar"), c.SvdConfig(name="svd")


class Toy(nn.Module):
    """Two linears that read the input, one that reads the sum of what they give, and a plain one."""

    shared_inputs = (("first", "second"), ("third",))

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.second = Linear(IN, MIDDLE), Linear(IN, MIDDLE)
        self.third, self.head = Linear(MIDDLE, OUT), Linear(OUT, 3)
        random = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=random, dtype=torch.float64) * 0.3).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        first, second = apply_shared(x, self.first, self.second)
        return self.head(torch.tanh(self.third(first * torch.tanh(second))))


BLOCKS = ["^(first|second|third)"]


def config(**own: object) -> c.RSOConfig:
    settings = {
        "name": "rso", "lr": LR, "betas": BETAS, "eps": EPS, "block_parameters": BLOCKS, "rank": RANK,
        "update_proj_gap": GAP, "on_refresh": c.OnRefresh.reset,
    }  # fmt: skip
    return c.RSOConfig(**(settings | own))  # type: ignore[arg-type]


def build(
    model: nn.Module, settings: c.OptimizerConfig, sampler: c.SamplerConfig = HAAR, **own: object
) -> CompositeOptimizer:
    arguments = {"seed": 0, "total_steps": STEPS} | own
    return build_optimizer(model, settings, sampler, **arguments)  # type: ignore[arg-type]


def batch(t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated inputs with a spectrum, so that informed bases are determined."""
    random = torch.Generator().manual_seed(100 + t)
    mix = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)).double())[0]
    x = torch.randn(TOKENS, IN, generator=random).double()
    return ((x * 0.7 ** torch.arange(IN)) @ mix.T).to(dtype)


def train(
    model: nn.Module, optimizer: CompositeOptimizer, steps: range, micro_batches: int = 1
) -> list[float]:
    losses = []
    for t in steps:
        total = 0.0
        for x in batch(t, next(model.parameters()).dtype).chunk(micro_batches):
            with optimizer.observing():
                loss = (model(x).float() - 1.0).square().sum() / TOKENS
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


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
    """The basis that the haar sampler draws for step t."""
    random = generator(0, "basis", "w.weight", (t - 1) // GAP)
    return haar(Draw(IN, rank, None, random, torch.device("cpu"))).double()


def seeded_then_dominant(t: int, x: Tensor, rank: int, old: Tensor | None) -> Tensor:
    """The random start of an informed sampler, then the principal axes of the last step's input."""
    if old is None:
        return haar(
            Draw(IN, rank, None, generator(0, "basis", "w.weight", "start"), torch.device("cpu"))
        ).double()
    return reference.dominant(t, x, rank, old if t > 2 else None)


CASES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "adam": ({}, {}),
    "adam-keep": ({"on_refresh": c.OnRefresh.keep}, {"on_refresh": "keep"}),
    "adam-transport": ({"on_refresh": c.OnRefresh.transport}, {"on_refresh": "transport"}),
    "momentum": ({"solver": c.InnerSolver.momentum}, {"solver": "momentum"}),
    "momentum-transport": (
        {"solver": c.InnerSolver.momentum, "on_refresh": c.OnRefresh.transport},
        {"solver": "momentum", "on_refresh": "transport"},
    ),
    "adagrad": ({"solver": c.InnerSolver.adagrad}, {"solver": "adagrad"}),
    "adagrad-transport": (
        {"solver": c.InnerSolver.adagrad, "on_refresh": c.OnRefresh.transport},
        {"solver": "adagrad", "on_refresh": "transport"},
    ),
    "proximal": ({"proximal_eta": 0.05}, {"proximal_eta": 0.05}),
    "decay": ({"weight_decay": 0.3}, {"weight_decay": 0.3}),
    "re-warmed": ({"refresh_warmup_steps": 3}, {"refresh_warmup_steps": 3}),
    "unscaled": ({"basis_scale": False}, {"basis_scale": 1.0}),
}  # fmt: skip

# Largest difference of an entry after 30 steps over the largest change of one. Ours in float64 draws its
# bases in float32 as the reference does: what is left is rounding of 1e-16, enlarged where Adam divides by
# a small gradient. float32: as in test_optim_reference.py.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def one_linear(
    own: dict[str, object], sampler: c.SamplerConfig, dtype: torch.dtype, out: int
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
    expected = reference.rso(before, inputs, output_gradient, draw=seeded, **(common | theirs))  # type: ignore[arg-type]
    moved = (expected - before).abs().max()
    assert moved > LR
    assert (after - expected).abs().max() < TOLERANCE[dtype] * moved


def test_informed_bases_are_those_of_the_last_steps_inputs() -> None:
    # T = 1: the random start serves step 1, the principal axes of step t−1's input every later one. The
    # axes come from a float32 Gram matrix of singular values 0.7^i, whose gaps enlarge its rounding to
    # some 1e-5.
    own = {"update_proj_gap": 1, "on_refresh": c.OnRefresh.transport}
    before, after = one_linear(own, SVD, torch.float64, OUT)
    expected = reference.rso(
        before, [batch(t) for t in range(1, STEPS + 1)], output_gradient, draw=seeded_then_dominant, lr=LR,
        rank=RANK, gap=1, betas=BETAS, eps=EPS, basis_scale=SCALE, on_refresh="transport",
    )  # fmt: skip
    assert (after - expected).abs().max() < 1e-3 * (expected - before).abs().max()


def test_at_full_rank_gradient_descent_in_b_is_gradient_descent() -> None:
    # P orthogonal: ΔB Pᵀ = −η (dW P) Pᵀ = −η dW, whatever the bases, refreshes and proximal-free rules.
    own = {
        "rank": IN, "solver": c.InnerSolver.momentum, "betas": (0.0, 0.99), "basis_scale": False, "lr": 0.1,
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
    rso = optimizer.parts[0]
    assert isinstance(rso, RSO)
    seen: list[Tensor] = []

    def refresh(*arguments: object) -> None:
        seen.append(model(batch(0)).detach())
        original(*arguments)  # type: ignore[arg-type]
        seen.append(model(batch(0)).detach())

    original, rso._refresh = rso._refresh, refresh  # type: ignore[method-assign]
    before = copy.deepcopy([site.basis for site in rso.sites])
    train(model, optimizer, range(GAP - 1, GAP))
    assert len(seen) == 2 * len(rso.sites)
    for output in seen[1:]:
        assert torch.equal(output, seen[0])
    assert not any(torch.equal(old, site.basis) for old, site in zip(before, rso.sites, strict=True))


SAMPLERS: dict[str, c.SamplerConfig] = {
    "haar": HAAR,
    "gaussian": c.GaussianConfig(name="gaussian"),
    "coordinate": c.CoordinateConfig(name="coordinate"),
    "srht": c.SRHTConfig(name="srht"),
    "svd": SVD,
    "importance": c.ImportanceConfig(name="importance"),
    "randomized_svd": c.RandomizedSvdConfig(name="randomized_svd"),
    "topk_norm": c.TopkNormConfig(name="topk_norm"),
    "mixture": c.MixtureConfig(name="mixture"),
    "golore": c.GoLoreConfig(name="golore"),
    "online_pca": c.OnlinePCAConfig(name="online_pca", orthonormalize=True),
}


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


@pytest.mark.parametrize("on_refresh", c.OnRefresh)
@pytest.mark.parametrize("precision", c.Precision)
@pytest.mark.parametrize("sampler", ["haar", "svd", "randomized_svd", "regenerated", "online_pca"])
def test_a_resumed_run_is_the_uninterrupted_run_bitwise(
    sampler: str, precision: c.Precision, on_refresh: c.OnRefresh
) -> None:
    own = {"on_refresh": on_refresh, "staggered": True, "proximal_eta": 1.0, "refresh_warmup_steps": 2}
    if sampler == "regenerated":
        own |= {"projection": c.BasisStorage.regenerated, "state_dtype": c.StateDtype.bfloat16}
    chosen = SAMPLERS.get(sampler, HAAR)
    dtype = torch.bfloat16 if precision is c.Precision.bf16 else torch.float32

    def fresh() -> tuple[nn.Module, CompositeOptimizer]:
        model = Reduced(dtype) if precision is c.Precision.bf16_mixed else Toy(dtype)
        return model, build(model, config(**own), chosen, precision=precision)

    model, optimizer = fresh()
    saved = {}
    for t in range(2 * GAP + 2):
        if t in (1, GAP - 1, GAP, GAP + 3):  # around the draws, and between them
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


class Reduced(Toy):
    """float32 weights, bfloat16 activations."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16))


@pytest.mark.parametrize("on_refresh", c.OnRefresh)
@pytest.mark.parametrize("sampler", ["haar", "gaussian", "coordinate", "srht"])
def test_regenerated_bases_are_the_stored_ones_bitwise(sampler: str, on_refresh: c.OnRefresh) -> None:
    if sampler == "gaussian" and on_refresh is c.OnRefresh.transport:
        pytest.skip("transport needs orthonormal bases")
    models = []
    for projection in c.BasisStorage:
        model = Toy()
        settings = config(projection=projection, on_refresh=on_refresh, staggered=True)
        optimizer = build(model, settings, SAMPLERS[sampler])
        train(model, optimizer, range(STEPS))
        models.append(model)
        held = [key for key in optimizer.state_dict() if key.endswith(".basis")]
        assert len(held) == (2 if projection is c.BasisStorage.stored else 0)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_proximal_term_pulls_b_towards_zero_with_its_gradient() -> None:
    # With no gradient from the loss, momentum with β₁ = 0 gives B ← B − η B/η_k, and W follows by ΔB Pᵀ.
    model = Toy()
    settings = config(solver=c.InnerSolver.momentum, betas=(0.0, 0.99), proximal_eta=0.1, basis_scale=False)
    optimizer = build(model, settings)
    rso = optimizer.parts[0]
    assert isinstance(rso, RSO)
    state = rso.state["third.weight"]
    coefficients = torch.randn(OUT, RANK, dtype=torch.float64)
    state["coefficients"].copy_(coefficients)
    weight = model.third.weight.detach().clone()
    basis = rso.bases["third.weight"]
    for holder in optimizer.gradient_holders():
        holder.grad = torch.zeros_like(holder, memory_format=torch.contiguous_format)
    optimizer.step()
    change = -LR / 0.1 * coefficients
    assert torch.allclose(state["coefficients"], coefficients + change, rtol=1e-12, atol=0)
    assert torch.allclose(model.third.weight, weight + change @ basis.double().T, rtol=0, atol=1e-12)


# --- state, rates, refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "sampler", "per_linear", "moments"),
    [
        ({}, "haar", 1, 2),
        ({"solver": c.InnerSolver.momentum}, "svd", 1, 1),
        ({"proximal_eta": 1.0}, "haar", 1, 3),
        ({"projection": c.BasisStorage.regenerated}, "haar", 0, 2),
    ],
)
def test_state_bytes_equal_the_formula(
    own: dict[str, object], sampler: str, per_linear: int, moments: int
) -> None:
    """2·r·out (adam) and a count a linear, r·in a site: the basis in the compute dtype, once for both."""
    for precision, size in ((c.Precision.fp32, 4), (c.Precision.bf16_mixed, 2)):
        optimizer = build(Toy(torch.float32), config(**own), SAMPLERS[sampler], precision=precision)
        blocks = sum(4 * (moments * RANK * out + 1) for out in (MIDDLE, MIDDLE, OUT))
        bases = per_linear * size * RANK * (IN + MIDDLE)
        assert optimizer.parts[0].state_bytes() == blocks + bases
        stored = {k: t for k, t in optimizer.state_dict().items() if k != "step"}
        total = sum(t.numel() * t.element_size() for t in stored.values())
        assert total == blocks + bases + 4 * 2 * 3 * OUT


def test_reduced_state_trains_and_takes_half() -> None:
    losses, sizes = [], []
    for state_dtype in c.StateDtype:
        model = Toy(torch.float32)
        optimizer = build(model, config(state_dtype=state_dtype))
        sizes.append(optimizer.state_bytes())
        losses.append(train(model, optimizer, range(60))[-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert sizes[0] - sizes[1] == 2 * 2 * (RANK * (2 * MIDDLE + OUT) + 3 * OUT)


def test_one_rank_for_each_site_and_the_table_shows_it() -> None:
    optimizer = build(Toy(), config(rank=0.5))
    rso = optimizer.parts[0]
    assert isinstance(rso, RSO)
    # first and second (10×12) share 0.5 · 10, third (16×10) has 0.5 · 10
    assert [(site.name, site.rank, site.size) for site in rso.sites] == [
        ("first.weight", 5, IN),
        ("third.weight", 5, MIDDLE),
    ]
    row = optimizer.table()[0]
    assert (row.group, row.rank, row.num_tensors, row.lr) == ("rso", "5", 3, LR)


def test_a_schedule_of_zero_moves_nothing_and_gradients_are_those_of_b() -> None:
    model = Toy()
    optimizer = build(model, config(weight_decay=0.1))
    before = copy.deepcopy(model.state_dict())
    optimizer.set_lr_factor(0.0)
    train(model, optimizer, range(3))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    shapes = sorted(tuple(holder.shape) for holder in optimizer.gradient_holders())
    assert shapes == sorted([(MIDDLE, RANK), (MIDDLE, RANK), (OUT, RANK), (3, OUT)])


def test_the_norm_of_scaled_gradients_estimates_the_full_gradients() -> None:
    # E‖dW P‖² = ‖dW‖² where E[PPᵀ] = I; 400 bases of rank 4 in 12: a standard error of about 2 %.
    gradient = torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = []
    for seed in range(400):
        model = One(OUT, torch.float64)
        optimizer = build(model, config(block_parameters=["w"]), seed=seed)
        basis = optimizer.parts[0].bases["w.weight"]  # type: ignore[attr-defined]
        squares.append(float((gradient @ basis).square().sum()))
    assert sum(squares) / 400 == pytest.approx(float(gradient.square().sum()), rel=0.06)


Model = Callable[[], nn.Module]


@pytest.mark.parametrize(
    ("own", "sampler", "message"),
    [
        ({"block_parameters": ["head"]}, HAAR, "head.weight, which RSO cannot project"),
        ({"rank": 11}, HAAR, "rank=11 is larger"),
        ({"proximal_eta": 0.0}, HAAR, "proximal_eta=0.0 must be positive"),
        ({"refresh_warmup_steps": GAP}, HAAR, "refresh_warmup_steps=7"),
        ({"refresh_warmup_steps": -1}, HAAR, "refresh_warmup_steps=-1"),
        ({"update_proj_gap": 0}, HAAR, "update_proj_gap=0"),
        ({"projection": c.BasisStorage.regenerated}, SVD, "cannot be regenerated"),
        ({}, c.SvdConfig(name="svd", solver=c.SvdSolver.full), "RSO never forms"),
        ({}, c.OnlinePCAConfig(name="online_pca"), "orthonormalize=true"),
        ({"basis_scale": False}, SAMPLERS["gaussian"], "scaled already"),
        ({"on_refresh": c.OnRefresh.transport}, SAMPLERS["gaussian"], "needs orthonormal bases"),
        ({}, c.NoSamplerConfig(name="none"), "needs a sampler"),
        ({"betas": (0.9, 1.0)}, HAAR, "AdaGrad"),
        ({}, c.MixtureConfig(name="mixture", principal_fraction=1.5), r"principal_fraction=1\.5"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_the_model(
    own: dict[str, object], sampler: c.SamplerConfig, message: str
) -> None:
    model = Toy()
    with pytest.raises(UserError, match=message):
        build(model, config(**own), sampler)
    assert not any(isinstance(module, SubspaceLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_informed_step_outside_observing_is_an_error() -> None:
    model = Toy()
    optimizer = build(model, config(), SVD)
    model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match="observing"):
        optimizer.step()


def test_inputs_that_are_not_finite_leave_the_basis() -> None:
    model = Toy()
    optimizer = build(model, config(), SVD)
    rso = optimizer.parts[0]
    assert isinstance(rso, RSO)
    before = rso.bases["first.weight"].clone()
    with optimizer.observing():
        model(batch(0)).sum().backward()
        model(torch.full((2, IN), torch.inf, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match=r"first\.weight is not finite"):
        optimizer.step()
    assert torch.equal(rso.bases["first.weight"], before)


# --- the mixture sampler -----------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_mixture_holds_the_dominant_axes_and_random_ones_outside(fraction: float) -> None:
    values, rank = torch.logspace(0, -2, 9), 4
    axes = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(3)))[0]

    def draw(seed: int) -> Tensor:
        gram = DenseGram(axes * values @ axes.T)
        return mixture(Draw(9, rank, gram, generator(seed), torch.device("cpu")), fraction)

    first, second = draw(0), draw(1)
    assert (first.T @ first - torch.eye(rank)).abs().max() < 1e-6
    principal = round(fraction * rank)
    inside = (axes[:, :principal].T @ first).square().sum()
    assert inside == pytest.approx(principal, abs=1e-4)
    overlap = float((first.T @ second).square().sum())
    assert overlap == pytest.approx(rank, abs=1e-4) if principal == rank else overlap < rank - 0.1
    if 0 < principal < rank:
        # what is not principal is spread over the complement by chance
        shares = torch.stack(
            [(axes[:, principal:].T @ draw(seed)[:, principal:]).square().sum(1) for seed in range(500)]
        )
        assert torch.allclose(
            shares.mean(0), torch.full((9 - principal,), (rank - principal) / (9 - principal)), atol=0.06
        )
