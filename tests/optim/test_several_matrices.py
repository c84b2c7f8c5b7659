"""Matrices of several shapes, in one bucket or in several, are updated as each of them alone."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.methods import OF_MATRICES, small, solver_variants
from torch import Tensor, nn

from rsotrain.config.choices import InnerSolver, OnRefresh, StateDtype
from rsotrain.config.methods import (
    ApolloConfig,
    FoamConfig,
    GaLoreConfig,
    OptimizerConfig,
    RSOConfig,
    SNSMConfig,
    SubspaceConfig,
)
from rsotrain.config.samplers import HaarConfig, NoSamplerConfig, SamplerConfig, SvdConfig
from rsotrain.config.schema import Precision
from rsotrain.instruments.devices import planning_for
from rsotrain.models.layers import Linear
from rsotrain.optim import adamw, buckets, rso, stacks, subspace_optimizer, sumo, weights
from rsotrain.optim.build import build_optimizer
from rsotrain.parallel.sharding import shard_of
from rsotrain.subspace.seeding import generator

BASE = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
LOW = {"rank": 3, "update_proj_gap": 5}
SVD, HAAR, NONE = SvdConfig(name="svd"), HaarConfig(name="haar"), NoSamplerConfig(name="none")


def noise(shape: tuple[int, int], *labels: str | int) -> Tensor:
    return torch.randn(shape, generator=generator(1, *labels))


# several of a shape, all orientations, mixed: whatever a bucket holds, they lie side by side in it
MATRICES = {
    "w0": (24, 10), "w1": (10, 24), "w2": (12, 12), "w3": (24, 10), "w4": (6, 40), "w5": (12, 12),
    "w6": (16, 6),
}  # fmt: skip
RESET, TRANSPORT = OnRefresh.reset, OnRefresh.transport
METHODS: dict[str, tuple[OptimizerConfig, SamplerConfig]] = {
    **{name: small(name, rank=3, gap=5, **BASE, scale=1.0) for name in OF_MATRICES},
    "galore-fraction": (GaLoreConfig(**BASE, **(LOW | {"rank": 0.25})), SVD),
    "galore-reset": (GaLoreConfig(on_refresh=RESET, **BASE, **LOW), HAAR),
    "galore-transport": (GaLoreConfig(on_refresh=TRANSPORT, **BASE, **LOW), HAAR),
    "sm-transport": (SNSMConfig(subset_size=1, on_refresh=TRANSPORT, **BASE, **LOW), HAAR),
    "apollo-haar": (ApolloConfig(**BASE, **(LOW | {"rank": 0.25})), HAAR),
}
for variant, solver in solver_variants("galore").items():
    METHODS[variant] = (GaLoreConfig(solver=solver, on_refresh=TRANSPORT, **BASE, **LOW), SVD)
KINDS = {"fp32": torch.float32, "bf16_mixed": torch.float32, "bf16": torch.bfloat16}


def trained(method: str, names: Sequence[str], precision: str, state: StateDtype) -> dict[str, Tensor]:
    """The weights after 12 steps of these matrices together, and the optimizer's state, by name."""
    config, sampler = METHODS[method]
    dtype = KINDS[precision]
    parameters = {n: nn.Parameter(noise(MATRICES[n], "start", n).to(dtype)) for n in names}
    config = replace(config, name=method, block_parameters=["w"], state_dtype=state)
    optimizer = build_optimizer(
        parameters.items(), config, sampler, precision=Precision(precision), seed=0, total_steps=12
    )
    for step in range(1, 13):
        for name, parameter in parameters.items():
            parameter.grad = noise(MATRICES[name], "gradient", name, step).to(dtype)
        optimizer.step()
    state_dict = optimizer.state_dict()
    del state_dict["step"]
    return {name: p.data for name, p in parameters.items()} | state_dict


def limit_buckets(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """At most ``limit`` elements a bucket; lists how many items the buckets that were made hold."""
    counts: list[int] = []

    def limited(items: Any, size: Any, largest: int = limit) -> list[list[Any]]:
        made: list[list[Any]] = buckets.buckets(items, size, min(largest, limit))
        counts.extend(len(bucket) for bucket in made)
        return made

    for module in (adamw, rso, subspace_optimizer):
        monkeypatch.setattr(module, "buckets", limited)
    return counts


@pytest.mark.parametrize(
    ("precision", "state"),
    [
        ("fp32", "float32"),
        ("fp32", "bfloat16"),
        ("fp32", "int8"),
        ("bf16_mixed", "float32"),
        ("bf16", "float32"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_matrices_together_are_bitwise_what_they_are_alone(
    method: str, precision: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one bucket, in several, and one matrix at a time: the same arithmetic on each."""
    kept = StateDtype(state)
    together = trained(method, list(MATRICES), precision, kept)
    alone: dict[str, Tensor] = {}
    for name in MATRICES:
        alone |= trained(method, [name], precision, kept)
    counts = limit_buckets(monkeypatch, 500 if method in ("adam", "adam8bit") else 150)
    split = trained(method, list(MATRICES), precision, kept)
    if counts:  # full-rank methods other than Adam have none
        assert len(counts) > 1
        assert max(counts) > 1
    assert together.keys() == alone.keys() == split.keys()
    for key, expected in alone.items():
        assert torch.equal(together[key], expected), key
        assert torch.equal(split[key], expected), key
    assert bool((together["w0"] != noise(MATRICES["w0"], "start", "w0").to(KINDS[precision])).any())
    assert not torch.equal(together["w0"], together["w3"])  # of one shape


def test_the_low_rank_methods_have_buckets_to_split(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in [name for name, (config, _) in METHODS.items() if isinstance(config, SubspaceConfig)]:
        counts = limit_buckets(monkeypatch, 150)
        trained(method, list(MATRICES), "fp32", StateDtype.float32)
        assert len(counts) > 1
    counts = limit_buckets(monkeypatch, 150)
    trained("galore", list(MATRICES), "fp32", StateDtype.float32)
    # M·r: 72, 72 | 36, 72 | 120 | 36, 48
    assert counts == [2, 2, 1, 2]


def test_pieces_of_a_matrix_are_bitwise_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW widens bfloat16 weights a piece at a time; pieces of 64 are whole vectors of any CPU."""
    whole = trained("adam", list(MATRICES), "bf16", StateDtype.float32)
    monkeypatch.setattr(adamw, "PIECE_ELEMENTS", 64)
    pieces = trained("adam", list(MATRICES), "bf16", StateDtype.float32)
    assert all(torch.equal(pieces[key], tensor) for key, tensor in whole.items())


class Linears(nn.Module):
    """Independent linears under RSO, each with an input of its own."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.shared_inputs = tuple((name,) for name in names)
        for name in names:
            out, size = MATRICES[name]
            linear = Linear(size, out)
            linear.weight.data = noise((out, size), "start", name)
            self.add_module(name, linear)

    def forward(self, step: int) -> Tensor:
        losses = []
        for name, linear in self.named_children():
            out, size = MATRICES[name]
            y = linear(noise((30, size), "input", name, step))
            losses.append((y - noise((30, out), "target", name, step)).square().sum())
        return torch.stack(losses).sum()


def _rso(names: Sequence[str], config: RSOConfig, sampler: SamplerConfig) -> dict[str, Tensor]:
    model = Linears(names)
    optimizer = build_optimizer(model, config, sampler, seed=0, total_steps=12)
    for step in range(1, 13):
        with optimizer.observing():
            loss = model(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    del state["step"]
    return {name: p.data for name, p in model.named_parameters()} | state


@pytest.mark.parametrize("solver", InnerSolver)
@pytest.mark.parametrize("sampler", [HAAR, SVD], ids=lambda sampler: sampler.name)
def test_rso_of_linears_together_is_bitwise_that_of_each_alone(
    sampler: SamplerConfig, solver: InnerSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RSOConfig(
        name="rso",
        on_refresh=TRANSPORT,
        solver=solver,
        proximal_eta=1.0,
        block_parameters=["w"],
        **BASE,
        **LOW,
    )
    together = _rso(list(MATRICES), config, sampler)
    alone: dict[str, Tensor] = {}
    for name in MATRICES:
        alone |= _rso([name], config, sampler)
    counts = limit_buckets(monkeypatch, 120)
    split = _rso(list(MATRICES), config, sampler)
    assert len(counts) > 1
    assert max(counts) > 1
    assert together.keys() == alone.keys() == split.keys()
    for key, expected in alone.items():
        assert torch.equal(together[key], expected), key
        assert torch.equal(split[key], expected), key


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        difference = (found[key].double() - tensor.double()).norm()
        assert difference <= tolerance * tensor.double().norm(), key


def go_the_way_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Update as on a GPU; the bases are drawn as on a CPU, so that the results can be compared."""
    for module in (adamw, stacks, weights):
        monkeypatch.setattr(module, "device_kind", lambda device: "cuda")


@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_s_stacks_are_what_a_cpu_updates_one_by_one(
    method: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of GPUs, with tensors of the CPU; whole stacks, and ones that hold no more than two matrices.

    Sums run in another order: 10⁻⁵ is some ten times what float32 shows. Newton-Schulz is in bfloat16. A
    state that is rounded, or a sign, may now and then come to lie on the other side.
    """
    kept = StateDtype(state)
    expected = trained(method, list(MATRICES), "fp32", kept)
    rounded = state != "float32" or method in ("muon", "normuon", "dion2")
    go_the_way_of_gpus(monkeypatch)
    for limit in (stacks.STACK_BYTES, 2 * 24 * 10 * 4 * (2 if state == "int8" else 1)):
        monkeypatch.setattr(stacks, "STACK_BYTES", limit)
        found = trained(method, list(MATRICES), "fp32", kept)
        assert_close(found, expected, 0.02 if rounded else 1e-5)


@pytest.mark.parametrize("sampler", [HAAR, SVD], ids=lambda sampler: sampler.name)
def test_rso_in_a_gpu_s_stacks_is_what_a_cpu_does(
    sampler: SamplerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RSOConfig(
        name="rso", on_refresh=TRANSPORT, proximal_eta=1.0, block_parameters=["w"], refresh_warmup_steps=2,
        staggered=True, **BASE, **LOW,
    )  # fmt: skip
    expected = _rso(list(MATRICES), config, sampler)
    go_the_way_of_gpus(monkeypatch)
    found = _rso(list(MATRICES), config, sampler)
    assert_close(found, expected, 1e-4)


def test_a_stack_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {f"w{i}": (4096, 4096) if i % 3 else (4096, 2048) for i in range(60)}
    parameters = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    shards = {name: shard_of(parameter) for name, parameter in parameters.items()}
    monkeypatch.setattr(stacks, "device_kind", lambda device: "cpu")
    alone = stacks.stacks_of(parameters, lambda name: shards[name].shape, shards, 4)
    assert alone == [[name] for name in parameters]
    go_the_way_of_gpus(monkeypatch)
    made = stacks.stacks_of(parameters, lambda name: shards[name].shape, shards, 4)
    assert sorted(name for names in made for name in names) == sorted(parameters)
    for names in made:
        assert len({parameters[name].shape for name in names}) == 1
        assert 4 * sum(parameters[name].numel() for name in names) <= stacks.STACK_BYTES
    square, half = (stacks.STACK_BYTES // (4 * math.prod(shape)) for shape in ((4096, 4096), (4096, 2048)))
    assert len(made) == math.ceil(40 / square) + math.ceil(20 / half) < 60


def test_stacks_of_8_bit_moments_are_half_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    go_the_way_of_gpus(monkeypatch)
    monkeypatch.setattr(stacks, "STACK_BYTES", 4 * 24 * 10 * 4)
    parameters = {f"w{i}": nn.Parameter(torch.zeros(24, 10)) for i in range(8)}
    for state, length in (("float32", 4), ("int8", 2)):
        config = FoamConfig(name="foam", block_parameters=["w"], state_dtype=StateDtype(state), **BASE)
        optimizer = build_optimizer(parameters.items(), config, NONE, seed=0, total_steps=1)
        assert [len(names) for names in optimizer.groups[0].stacks] == [length] * (8 // length)


@pytest.mark.parametrize("state", [StateDtype.float32, StateDtype.bfloat16])
def test_sumos_matrices_wait_for_each_other_on_a_gpu(
    state: StateDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roots of several stacks are found together, unless their momenta are copies: the same numbers."""
    found: list[int] = []
    original = sumo.inverse_roots
    monkeypatch.setattr(sumo, "inverse_roots", lambda grams: found.append(len(grams)) or original(grams))
    with planning_for("cuda"):
        waited = trained("sumo", list(MATRICES), "fp32", state)
        together, found[:] = list(found), []
        monkeypatch.setattr(sumo, "ROOT_BYTES", 0)
        at_once = trained("sumo", list(MATRICES), "fp32", state)
    assert len(found) > 12  # stacks
    assert together == ([len(MATRICES)] * 12 if state is StateDtype.float32 else found)
    assert sum(found) == 12 * len(MATRICES)
    assert all(torch.equal(waited[key], tensor) for key, tensor in at_once.items())
