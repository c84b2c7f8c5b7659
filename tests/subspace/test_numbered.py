"""Bases of which the state keeps the numbers of their columns in the cosine transform."""

from dataclasses import replace

import pytest
import torch
from helpers.methods import small
from helpers.one_matrix import gradients
from torch import Tensor, nn

from rsotrain.config.choices import BasisStorage, OnRefresh
from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.samplers import DctConfig, SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.instruments.devices import planning_for
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.subspace.numbered import cosine_basis, cosine_columns, number_dtype, numbers_of

METHODS = ("galore", "fira", "apollo", "frugal", "carry", "orbit", "ldadam", "sn_sm", "sm", "alice", "sumo")
SHAPES = {"a": (24, 10), "b": (10, 24), "c": (24, 10)}
STEPS = 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_numbers_are_found_in_their_columns(size: int, dtype: torch.dtype) -> None:
    basis = cosine_basis(size, torch.device("cpu"))
    assert torch.allclose(basis.T @ basis, torch.eye(size), atol=1e-5)
    numbers = torch.stack([torch.arange(size), torch.arange(size).flip(0)])
    numbers[1, 0] = -1
    columns = cosine_columns(numbers, size)
    assert torch.equal(columns[0], basis)
    assert not columns[1, :, 0].any()
    assert torch.equal(numbers_of(columns.to(dtype)), numbers)


def test_a_number_has_two_bytes_where_these_are_enough() -> None:
    for size in (1, 2**15 - 1, 2**15):
        assert torch.iinfo(number_dtype(size)).max >= size - 1
    assert number_dtype(4096).itemsize == 2


def settings(method: str, storage: BasisStorage) -> tuple[OptimizerConfig, SamplerConfig]:
    config, _ = small(method, rank=3, gap=2, lr=0.01, scale=1.0, block_parameters=["[abc]"])
    return config, DctConfig(name="dct", storage=storage)


def made(
    weights: dict[str, Tensor],
    config: OptimizerConfig,
    sampler: SamplerConfig,
    kind: str,
    precision: Precision,
) -> tuple[dict[str, nn.Parameter], CompositeOptimizer]:
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    with planning_for(kind):
        return parameters, build_optimizer(
            parameters.items(), config, sampler, precision=precision, seed=0, total_steps=STEPS
        )


def train(
    parameters: dict[str, nn.Parameter], optimizer: CompositeOptimizer, steps: range, kind: str
) -> None:
    with planning_for(kind):
        for step in steps:
            for seed, (name, parameter) in enumerate(parameters.items()):
                parameter.grad = gradients(SHAPES[name], seed)[step]
            optimizer.step()


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16_mixed])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("method", METHODS)
def test_numbered_bases_are_bitwise_the_stored_ones(method: str, kind: str, precision: Precision) -> None:
    """Weights and all other state, through refreshes; and a run that stops in between goes on alike."""
    weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    ends = {}
    for storage in BasisStorage:
        config, sampler = settings(method, storage)
        parameters, optimizer = made(weights, config, sampler, kind, precision)
        train(parameters, optimizer, range(STEPS), kind)
        ends[storage] = parameters, optimizer.state_dict()
    (stored, old), (numbered, new) = ends[BasisStorage.stored], ends[BasisStorage.regenerated]
    for name, parameter in stored.items():
        assert torch.equal(numbered[name], parameter), name
        assert parameter.any()
        numbers = new[f"{name}.columns"]
        assert numbers.dtype is torch.int16
        basis = cosine_columns(numbers, min(SHAPES[name]))
        assert torch.equal(basis.to(old[f"{name}.basis"].dtype), old[f"{name}.basis"])
    others = {key for key in old if not key.endswith(".basis")}
    assert others == {key for key in new if not key.endswith(".columns")}
    for key in others - {"step"}:
        assert torch.equal(new[key], old[key]), key

    config, sampler = settings(method, BasisStorage.regenerated)
    first, half = made(weights, config, sampler, kind, precision)
    train(first, half, range(3), kind)
    second, whole = made({n: p.data for n, p in first.items()}, config, sampler, kind, precision)
    whole.load_state_dict(half.state_dict())
    train(second, whole, range(3, STEPS), kind)
    for name, parameter in numbered.items():
        assert torch.equal(second[name], parameter), name


def test_before_its_first_refresh_a_basis_is_zero() -> None:
    config, sampler = settings("galore", BasisStorage.regenerated)
    config = replace(config, on_refresh=OnRefresh.transport)  # type: ignore[call-arg]
    parameters, optimizer = made({"a": torch.zeros(24, 10)}, config, sampler, "cpu", Precision.fp32)
    parameters["a"].grad = torch.zeros(24, 10)
    optimizer.step()
    assert bool((optimizer.state_dict()["a.columns"] == -1).all())
    parameters["a"].grad = gradients((24, 10))[0]
    optimizer.step()
    assert bool((optimizer.state_dict()["a.columns"] >= 0).all())
    assert parameters["a"].any()
