"""From configuration to a running optimizer: claims, refusals, every pair, state, resume."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import methods as names
from helpers.methods import OF_MATRICES, sampler_config, small, solver_variants
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh, StateDtype
from rsotrain.config.methods import LDAdamConfig, OptimizerConfig, SubspaceConfig
from rsotrain.config.samplers import (
    GoLoreConfig,
    ImportanceConfig,
    OnlinePCAConfig,
    RandomizedSvdConfig,
    SamplerConfig,
    SvdConfig,
    SvdSolver,
)
from rsotrain.config.schema import Precision
from rsotrain.errors import UserError
from rsotrain.models.architecture import Kind, Weight
from rsotrain.optim.build import build_optimizer, build_sampler, method_of
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.state_size import WeightsLayout
from rsotrain.optim.subspace_optimizer import SubspaceOptimizer

IN, HIDDEN = 12, 20


class Tiny(nn.Module):
    """Matrices of all three orientations, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN, bias=False)
        self.square = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, IN, bias=False)
        self.norm = nn.LayerNorm(IN)
        self.head = nn.Linear(IN, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.square(torch.tanh(self.up(x)))))))


BLOCKS = [r"^(up|down)\.weight$", r"^square\.weight$"]
RANK, GAP, STEPS = 3, 10, 50
TRANSPORT = OnRefresh.transport
PAIRS: dict[str, tuple[OptimizerConfig, SamplerConfig]] = {
    name: small(name, rank=RANK, gap=GAP, lr=0.01, scale=4.0 if name.startswith("s") else 1.0)
    for name in OF_MATRICES
}
for base in ("galore", "fira", "frugal"):
    for variant, solver in solver_variants(base).items():
        PAIRS[variant] = replace(PAIRS[base][0], name=variant, solver=solver), PAIRS[base][1]  # type: ignore[call-arg]
PAIRS["galore-transport"] = (
    replace(PAIRS["galore"][0], name="galore-transport", on_refresh=TRANSPORT, staggered=True),  # type: ignore[call-arg]
    PAIRS["galore"][1],
)
OPTIMIZERS = {name: optimizer for name, (optimizer, _) in PAIRS.items()}
SAMPLERS: dict[str, SamplerConfig] = {name: sampler_config(name) for name in names.SAMPLERS} | {
    "full_svd": SvdConfig(name="full_svd", solver=SvdSolver.full),
    "online_pca-orthonormal": OnlinePCAConfig(name="online_pca-orthonormal", orthonormalize=True),
}


def sampler_of(name: str) -> SamplerConfig:
    return PAIRS[name][1]


def build(
    model: nn.Module, optimizer: OptimizerConfig, sampler: SamplerConfig, **own: object
) -> CompositeOptimizer:
    arguments = {"seed": 3, "total_steps": STEPS} | own
    return build_optimizer(model, replace(optimizer, block_parameters=BLOCKS), sampler, **arguments)  # type: ignore[arg-type]


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def task() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(64, IN, generator=random)
    return x, (x @ torch.randn(IN, 5, generator=random)).argmax(1)


def train(model: nn.Module, optimizer: CompositeOptimizer, steps: int, micro_batches: int = 1) -> list[float]:
    x, y = task()
    losses = []
    for _ in range(steps):
        total = 0.0
        for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = nn.functional.cross_entropy(model(part_x), part_y, reduction="sum") / len(x)
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def refusal(optimizer: str, sampler: str) -> str | None:
    """The reason why a pair must be refused."""
    config = OPTIMIZERS[optimizer]
    method, chosen = method_of(config), build_sampler(SAMPLERS[sampler])
    if not isinstance(config, SubspaceConfig):
        return None if chosen is None else "would do nothing"
    if chosen is None:
        return "needs a sampler"
    assert issubclass(method, SubspaceOptimizer)
    transports = config.on_refresh is OnRefresh.transport
    if not chosen.orthonormal and (method.needs_orthonormal or transports):
        return "needs orthonormal bases"
    if isinstance(config, LDAdamConfig) and chosen.post_update:
        return "before the update"
    return None


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_pair_trains_or_is_refused(optimizer: str, sampler: str) -> None:
    model = tiny()
    if reason := refusal(optimizer, sampler):
        with pytest.raises(UserError, match=reason):
            build(model, OPTIMIZERS[optimizer], SAMPLERS[sampler])
        return
    start = copy.deepcopy(model)
    losses = train(model, build(model, OPTIMIZERS[optimizer], SAMPLERS[sampler]), STEPS)
    assert losses[-1] < 0.8 * losses[0]
    for (name, now), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(now, before), f"{name} did not move"


@pytest.mark.parametrize("state_dtype", StateDtype)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_run_bitwise(name: str, state_dtype: StateDtype) -> None:
    config = replace(OPTIMIZERS[name], state_dtype=state_dtype)
    for sampler in [sampler_of(name), *([SAMPLERS["online_pca"]] if name == "galore" else [])]:
        model = tiny()
        optimizer = build(model, config, sampler)
        keys = set(optimizer.state_dict())
        train(model, optimizer, 13)
        stream = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], stream)
        stream.seek(0)
        weights, state = torch.load(stream, weights_only=True)
        assert set(state) == keys
        assert all(isinstance(t, Tensor) for t in state.values())
        other = tiny()
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.load_state_dict(weights)
        resumed = build(other, config, sampler)
        resumed.load_state_dict(state)
        train(model, optimizer, 12)
        train(other, resumed, 12)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        for key, value in optimizer.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_micro_batches_equal_one_batch(name: str) -> None:
    config = replace(OPTIMIZERS[name], state_dtype=StateDtype.float32)  # 8 bits are of float32 weights
    models = []
    for micro_batches in (1, 4):
        model = tiny().double()  # in float32 Adam would enlarge the different order of the sums
        optimizer = build(model, config, sampler_of(name))
        x, y = task()
        for _ in range(12):
            for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                loss = nn.functional.cross_entropy(model(part_x.double()), part_y, reduction="sum")
                (loss / len(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    tolerance = 1e-2 if name in names.ORTHOGONALISED_IN_BFLOAT16 else 1e-5  # bases are in float32
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert bool((p - q).abs().max() < tolerance)


MATRICES = [(HIDDEN, IN), (HIDDEN, HIDDEN), (IN, HIDDEN)]
FORMULAS: dict[str, Callable[[int, int], int]] = {  # bytes for k ≤ M, with 4 bytes an element
    "adam": lambda M, k: 4 * 2 * M * k,
    **dict.fromkeys(("muon", "dion2", "lion"), lambda M, k: 4 * M * k),
    "sumo": lambda M, k: 4 * (k * RANK + M * RANK),
    "alice": lambda M, k: 4 * (k * RANK + 2 * M * RANK + RANK**2 + M + 2),
    "alice_0": lambda M, k: 4 * (k * RANK + 2 * M * RANK + M + 2),
    "sn": lambda M, k: 4 * (M * k + M),
    "foam": lambda M, k: 4 * 2 * M * k // 4,  # these sizes have no remainder
    "scale": lambda M, k: 0,
    "racs": lambda M, k: 4 * (M + k + 1),
    "soap": lambda M, k: 4 * 2 * (M * k + M**2 + k**2),
    "galore": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 1),
    "sn_sm": lambda M, k: 4 * (k * RANK + M * RANK + M),
    "sm": lambda M, k: 4 * (k * RANK + M * RANK + M * k),
    "fira": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 2),
    "frugal": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 1),
    "orbit": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 1),
    "apollo": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 2),
    "apollo_mini": lambda M, k: 4 * (k + 2 * M + 2),
    "ldadam": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 1 + M * k),
    "galore-transport": lambda M, k: 4 * (k * RANK + 2 * M * RANK + 1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_bytes_equal_the_formula(name: str) -> None:
    optimizer = build(tiny(), OPTIMIZERS[name], sampler_of(name))
    rest = 4 * 2 * (2 * IN + 5 * IN)
    config, sampler = OPTIMIZERS[name], build_sampler(sampler_of(name))
    weights = [Weight(str(shape), shape, Kind.linear) for shape in MATRICES]
    layout = WeightsLayout(
        1,
        config.state_dtype,
        basis_bytes=4,
        sampler_state=(lambda size, rank: 0) if sampler is None else sampler.state_bytes,
    )
    expected = rest + method_of(config).state_bytes_formula(config, weights, layout)
    assert optimizer.state_bytes() == expected
    if name in FORMULAS:
        assert expected == rest + sum(FORMULAS[name](max(shape), min(shape)) for shape in MATRICES)
    stored = {key: t for key, t in optimizer.state_dict().items() if key != "step"}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == expected
    assert sum(row.state_bytes for row in optimizer.table()) == expected


def test_state_bytes_of_reduced_state_and_of_online_pca() -> None:
    galore = OPTIMIZERS["galore"]
    reduced = build(tiny(), replace(galore, state_dtype=StateDtype.bfloat16), SAMPLERS["svd"])
    full = build(tiny(), galore, SAMPLERS["svd"])
    moments = sum(2 * max(s) * RANK for s in MATRICES) + 2 * (2 * IN + 5 * IN)
    assert full.state_bytes() - reduced.state_bytes() == 2 * moments
    osd = build(tiny(), galore, SAMPLERS["online_pca"])
    assert osd.state_bytes() - full.state_bytes() == sum(4 * (2 * min(s) * RANK + 1) for s in MATRICES)


def test_block_linears_get_scaled_rates_and_the_schedule_reaches_all() -> None:
    for name, config in OPTIMIZERS.items():
        optimizer = build(tiny(), replace(config, lr=0.02, scale=0.25), sampler_of(name))
        assert [group.peak_lr for group in optimizer.groups] == [0.005, 0.02]
        model = tiny()
        optimizer = build(model, replace(config, weight_decay=0.1), sampler_of(name))
        before = copy.deepcopy(model.state_dict())
        optimizer.set_lr_factor(0.0)
        train(model, optimizer, 2)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), f"{name} moved {key} at a rate of 0"


def test_online_pca_rate_follows_the_schedule() -> None:
    model = tiny()
    optimizer = build(model, replace(OPTIMIZERS["galore"], update_proj_gap=1), SAMPLERS["online_pca"])
    train(model, optimizer, 2)
    basis = optimizer.state_dict()["up.weight.basis"].clone()
    optimizer.set_lr_factor(0.0)
    train(model, optimizer, 1)
    assert torch.equal(optimizer.state_dict()["up.weight.basis"], basis)


def test_weight_decay_is_decoupled_for_every_method() -> None:
    """With gradients of 0 and all else 0, each step multiplies by 1 − lr·decay."""
    for name, config in OPTIMIZERS.items():
        model = tiny()
        before = copy.deepcopy(model.state_dict())
        optimizer = build(model, replace(config, scale=0.5, weight_decay=0.1), sampler_of(name))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for key, rate in (("up.weight", 0.005), ("down.weight", 0.005), ("head.weight", 0.01)):
            assert torch.allclose(model.state_dict()[key], before[key] * (1 - 0.1 * rate), rtol=1e-6), name


def test_bfloat16_state_tracks_float32_state() -> None:
    for name in ("adam", "galore", "sn_sm"):
        finals = []
        for state_dtype in StateDtype:
            model = tiny()
            optimizer = build(model, replace(OPTIMIZERS[name], state_dtype=state_dtype), sampler_of(name))
            finals.append(train(model, optimizer, 60)[-1])
        assert finals[1] == pytest.approx(finals[0], rel=0.2, abs=0.02)


def test_claims_cover_each_parameter_once_and_the_table_shows_them() -> None:
    model = tiny()
    model.head.weight.requires_grad_(False)
    optimizer = build(model, OPTIMIZERS["galore"], SAMPLERS["svd"])
    blocks, rest, frozen = optimizer.table()
    assert (blocks.group, blocks.num_tensors, blocks.rank, blocks.lr) == ("galore", 3, "3", 0.01)
    assert (rest.num_tensors, rest.rank) == (2, "full")
    assert (frozen.group, frozen.pattern, frozen.num_elements, frozen.lr) == (
        "frozen",
        "head.weight",
        5 * IN,
        None,
    )
    total = sum(row.num_elements for row in optimizer.table())
    assert total == sum(p.numel() for p in model.parameters())
    assert not any(key.startswith("head") for key in optimizer.state_dict())


def test_tied_weights_count_once_and_fractions_of_the_rank_vary() -> None:
    model = tiny()
    model.alias = model.up  # type: ignore[assignment]
    pairs = list(model.named_parameters(remove_duplicate=False))
    assert len(pairs) == len(list(model.parameters())) + 1
    config = replace(OPTIMIZERS["galore"], rank=0.25, block_parameters=BLOCKS)
    optimizer = build_optimizer(pairs, config, SAMPLERS["svd"], seed=0, total_steps=1)
    assert optimizer.table()[0].num_tensors == 3
    assert optimizer.table()[0].rank == "3–5"


@pytest.mark.parametrize(
    ("config", "sampler", "message"),
    [
        (replace(OPTIMIZERS["adam"], block_parameters=["nothing"]), "none", "'nothing' matches no parameter"),
        (replace(OPTIMIZERS["adam"], block_parameters=["up", "("]), "none", "no regular expression"),
        (replace(OPTIMIZERS["adam"], block_parameters=["norm"]), "none", "not a matrix"),
        (replace(OPTIMIZERS["galore"], rank=13, block_parameters=["up"]), "svd", "rank=13 is larger"),
        (
            replace(OPTIMIZERS["galore"], update_proj_gap=0, block_parameters=["up"]),
            "svd",
            "update_proj_gap=0",
        ),
        (replace(OPTIMIZERS["galore"], betas=(0.9, 1.0), block_parameters=["up"]), "svd", "AdaGrad"),
        (replace(OPTIMIZERS["galore"], betas=(0.9,), block_parameters=["up"]), "svd", "two numbers"),  # type: ignore[arg-type]
        (replace(OPTIMIZERS["sn"], subset_size=5, block_parameters=["up"]), "none", "subset_size=5"),
        (
            replace(OPTIMIZERS["ldadam"], on_refresh=OnRefresh.keep, block_parameters=["up"]),
            "svd",
            "transport",
        ),
    ],
)
def test_mistakes_get_a_sentence(config: OptimizerConfig, sampler: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        build_optimizer(tiny(), config, SAMPLERS[sampler], seed=0, total_steps=1)


@pytest.mark.parametrize(
    "sampler",
    [
        ImportanceConfig(name="importance", power=0.0),
        RandomizedSvdConfig(name="randomized_svd", rounds=0),
        OnlinePCAConfig(name="online_pca", lr=-1.0),
        GoLoreConfig(name="golore", random_fraction=1.5),
    ],
)
def test_sampler_settings_out_of_range(sampler: SamplerConfig) -> None:
    with pytest.raises(UserError, match=r"sampler\.\w+="):
        build(tiny(), OPTIMIZERS["galore"], sampler)


def test_loading_another_optimizers_state_is_refused_and_changes_nothing() -> None:
    optimizer = build(tiny(), OPTIMIZERS["galore"], SAMPLERS["svd"])
    before = {key: value.clone() for key, value in optimizer.state_dict().items()}
    other_rank = build(tiny(), replace(OPTIMIZERS["galore"], rank=2), SAMPLERS["svd"]).state_dict()
    reduced = replace(OPTIMIZERS["galore"], state_dtype=StateDtype.bfloat16)
    wrong = {
        "has no optimizer state": build(tiny(), OPTIMIZERS["adam"], SAMPLERS["none"]).state_dict(),
        "unexpected": build(tiny(), OPTIMIZERS["fira"], SAMPLERS["svd"]).state_dict(),
        r"of shape \(12, 2\)": other_rank,
        "torch.bfloat16": build(tiny(), reduced, SAMPLERS["svd"]).state_dict(),
    }
    for message, state in wrong.items():
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(state)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state_dict().items())


def test_same_run_twice_is_bitwise_the_same_and_another_seed_is_not() -> None:
    results = []
    for seed in (3, 3, 4):
        model = tiny()
        train(model, build(model, OPTIMIZERS["galore"], SAMPLERS["haar"], seed=seed), 12)
        results.append(model.up.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("precision", [Precision.bf16_mixed, Precision.bf16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_in_reduced_precision(name: str, precision: Precision) -> None:
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    model = tiny().to(dtype)
    optimizer = build(model, OPTIMIZERS[name], sampler_of(name), precision=precision)
    x, y = task()
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.85 * losses[0]
