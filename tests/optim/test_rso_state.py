"""RSO's books: the proximal term, bytes of state, ranks, rates, refusals; the mixture sampler."""

import copy

import pytest
import torch
from helpers.rso_toy import (
    GAP,
    HAAR,
    IN,
    LR,
    MIDDLE,
    OUT,
    RANK,
    SAMPLERS,
    SVD,
    Toy,
    batch,
    build,
    config,
    train,
)
from torch import Tensor

from rsotrain.config.choices import BasisStorage, InnerSolver, OnRefresh, StateDtype
from rsotrain.config.samplers import (
    MixtureConfig,
    NoSamplerConfig,
    OnlinePCAConfig,
    SamplerConfig,
    SvdConfig,
    SvdSolver,
)
from rsotrain.config.schema import Precision
from rsotrain.errors import UserError
from rsotrain.models.subspace_linear import SubspaceLinear
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.rso import RSO
from rsotrain.subspace.gram import DenseGram
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator
from rsotrain.subspace.spectral import mixture


def rso_of(optimizer: CompositeOptimizer) -> RSO:
    rso = optimizer.groups[0]
    assert isinstance(rso, RSO)
    return rso


def test_the_proximal_term_pulls_b_towards_zero_with_its_gradient() -> None:
    # With no gradient from the loss, momentum with β₁ = 0 gives B ← B − η B/η_k, and W follows by ΔB Pᵀ.
    model = Toy()
    settings = config(solver=InnerSolver.momentum, betas=(0.0, 0.99), proximal_eta=0.1, basis_scale=False)
    optimizer = build(model, settings)
    rso = rso_of(optimizer)
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


@pytest.mark.parametrize(
    ("own", "sampler", "per_linear", "moments"),
    [
        ({}, "haar", 1, 2),
        ({"solver": InnerSolver.momentum}, "svd", 1, 1),
        ({"proximal_eta": 1.0}, "haar", 1, 3),
        ({"projection": BasisStorage.regenerated}, "haar", 0, 2),  # a seed of 8 bytes for each input group
    ],
)
def test_state_bytes_equal_the_formula(
    own: dict[str, object], sampler: str, per_linear: int, moments: int
) -> None:
    """2·r·out (adam) and a count for each linear; r·in in the compute dtype for each input group's basis."""
    for precision, size in ((Precision.fp32, 4), (Precision.bf16_mixed, 2)):
        optimizer = build(Toy(torch.float32), config(**own), SAMPLERS[sampler], precision=precision)
        blocks = sum(4 * (moments * RANK * out + 1) for out in (MIDDLE, MIDDLE, OUT))
        bases = per_linear * size * RANK * (IN + MIDDLE) if per_linear else 2 * 8
        assert optimizer.groups[0].state_bytes() == blocks + bases
        stored = {k: t for k, t in optimizer.state_dict().items() if k != "step"}
        total = sum(t.numel() * t.element_size() for t in stored.values())
        assert total == blocks + bases + 4 * 2 * 3 * OUT


def test_reduced_state_trains_and_takes_half() -> None:
    losses, sizes = [], []
    for state_dtype in StateDtype:
        model = Toy(torch.float32)
        optimizer = build(model, config(state_dtype=state_dtype))
        sizes.append(optimizer.state_bytes())
        losses.append(train(model, optimizer, range(60))[-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert sizes[0] - sizes[1] == 2 * 2 * (RANK * (2 * MIDDLE + OUT) + 3 * OUT)


def test_one_rank_for_each_input_group_and_the_table_shows_it() -> None:
    optimizer = build(Toy(), config(rank=0.5))
    rso = rso_of(optimizer)
    # first and second (10×12) share 0.5 · 10, third (16×10) has 0.5 · 10
    assert [(group.name, group.rank, group.size) for group in rso.input_groups] == [
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
        basis = rso_of(build(Toy(), config(), seed=seed)).bases["first.weight"]
        squares.append(float((gradient @ basis).square().sum()))
    assert sum(squares) / 400 == pytest.approx(float(gradient.square().sum()), rel=0.06)


@pytest.mark.parametrize(
    ("own", "sampler", "message"),
    [
        ({"block_parameters": ["head"]}, HAAR, "head.weight, which RSO cannot project"),
        ({"rank": 11}, HAAR, "rank=11 is larger"),
        ({"proximal_eta": 0.0}, HAAR, "proximal_eta=0.0 must be positive"),
        ({"refresh_warmup_steps": GAP}, HAAR, "refresh_warmup_steps=7"),
        ({"refresh_warmup_steps": -1}, HAAR, "refresh_warmup_steps=-1"),
        ({"update_proj_gap": 0}, HAAR, "update_proj_gap=0"),
        ({"projection": BasisStorage.regenerated}, SVD, "cannot be regenerated"),
        ({}, SvdConfig(name="svd", solver=SvdSolver.full), "RSO never forms"),
        ({}, OnlinePCAConfig(name="online_pca"), "orthonormalize=true"),
        ({"basis_scale": False}, SAMPLERS["gaussian"], "scaled already"),
        ({"on_refresh": OnRefresh.transport}, SAMPLERS["gaussian"], r"haar.*, or set .*on_refresh=keep"),
        ({}, NoSamplerConfig(name="none"), "needs a sampler"),
        ({"betas": (0.9, 1.0)}, HAAR, "AdaGrad"),
        ({}, MixtureConfig(name="mixture", principal_fraction=1.5), r"principal_fraction=1\.5"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_the_model(
    own: dict[str, object], sampler: SamplerConfig, message: str
) -> None:
    model = Toy()
    with pytest.raises(UserError, match=message):
        build(model, config(**own), sampler)
    assert not any(isinstance(module, SubspaceLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("sampler", ["haar", "svd"])
def test_a_model_without_memory_samples_nothing(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleRequest, "normal", None)
    optimizer = build(Toy(torch.float32).to("meta"), config(), SAMPLERS[sampler])
    assert all(group.basis is not None and group.basis.is_meta for group in rso_of(optimizer).input_groups)


@pytest.mark.parametrize("sampler", ["svd", "importance", "randomized_svd", "mixture", "online_pca"])
def test_the_scale_of_bases_is_no_affair_of_the_samplers(sampler: str) -> None:
    """Those that go on from the basis in use see it orthonormal."""
    found = []
    for scaled in (True, False):
        model = Toy()
        optimizer = build(model, config(basis_scale=scaled, lr=0.0, update_proj_gap=2), SAMPLERS[sampler])
        train(model, optimizer, range(7))
        found.append([(group, group.current_basis()) for group in rso_of(optimizer).input_groups])
    for (group, large), (_, orthonormal) in zip(*found, strict=True):
        columns = rso_of(optimizer).bases.sampler.column_scales
        scale = (group.size / group.rank) ** 0.5 if columns is None else columns(group.size, group.rank)
        assert torch.allclose(large / scale, orthonormal, rtol=0, atol=1e-4)  # of float32 spectra


@pytest.mark.parametrize("sampler", ["svd", "online_pca"])
def test_staggered_input_groups_gather_in_turn_from_the_first_step_on(sampler: str) -> None:
    """No step holds the Gram matrices of all; the first bases are principal axes, for online PCA too."""
    model = Toy()
    optimizer = build(model, config(staggered=True), SAMPLERS[sampler])
    gathered: dict[int, list[str]] = {}
    for t in range(2 * GAP):
        with optimizer.observing():
            model(batch(t)).square().sum().backward()
        due = [group for group in rso_of(optimizer).input_groups if group.gram is not None]
        if due:
            gathered[t + 1] = [group.name for group in due]
        grams = {group: group.gram.clone() for group in due if group.gram is not None}
        optimizer.step()
        for group, lower in grams.items():
            axes = torch.linalg.eigh(lower)[1][:, -RANK:]  # reads the lower triangle
            assert group.basis is not None
            captured = float((axes.T @ group.basis.double()).square().sum()) * group.rank / group.size
            if t < GAP - 1:
                assert captured == pytest.approx(RANK, rel=1e-3)
        optimizer.zero_grad()
    # of two matrices the second's turn comes after T // 2 steps; its refresh is at the end of the one before
    first, third = ["first.weight"], ["third.weight"]
    assert gathered == {1: first, GAP // 2: third, GAP: first, GAP + GAP // 2: third, 2 * GAP: first}


def test_an_informed_step_outside_observing_is_an_error() -> None:
    model = Toy()
    optimizer = build(model, config(), SVD)
    model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match="observing"):
        optimizer.step()


def test_inputs_of_a_step_that_was_given_up_are_forgotten() -> None:
    model = Toy()
    optimizer = build(model, config(), SVD)
    with optimizer.observing():
        model(batch(0)).sum().backward()
    model(batch(0))  # no part of the step
    input_groups = rso_of(optimizer).input_groups
    assert all(group.gram is not None and not group.observing for group in input_groups)
    optimizer.zero_grad()
    assert all(group.gram is None for group in input_groups)


def test_inputs_that_are_not_finite_leave_the_basis() -> None:
    model = Toy()
    optimizer = build(model, config(), SVD)
    rso = rso_of(optimizer)
    before = rso.bases["first.weight"].clone()
    with optimizer.observing():
        model(batch(0)).sum().backward()
        model(torch.full((2, IN), torch.inf, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match=r"first\.weight is not finite"):
        optimizer.step()
    assert torch.equal(rso.bases["first.weight"], before)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_mixture_holds_the_dominant_axes_and_random_ones_outside(fraction: float) -> None:
    values, rank = torch.logspace(0, -2, 9), 4
    axes = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(3)))[0]

    def sample(seed: int) -> Tensor:
        gram = DenseGram(axes * values @ axes.T)
        return mixture(SampleRequest(9, rank, gram, generator(seed), torch.device("cpu")), fraction)

    first, second = sample(0), sample(1)
    assert (first.T @ first - torch.eye(rank)).abs().max() < 1e-6
    principal = round(fraction * rank)
    inside = (axes[:, :principal].T @ first).square().sum()
    assert inside == pytest.approx(principal, abs=1e-4)
    overlap = float((first.T @ second).square().sum())
    assert overlap == pytest.approx(rank, abs=1e-4) if principal == rank else overlap < rank - 0.1
    if 0 < principal < rank:
        # what is not principal is spread over the complement by chance
        shares = torch.stack(
            [(axes[:, principal:].T @ sample(seed)[:, principal:]).square().sum(1) for seed in range(500)]
        )
        assert torch.allclose(
            shares.mean(0), torch.full((9 - principal,), (rank - principal) / (9 - principal)), atol=0.06
        )
