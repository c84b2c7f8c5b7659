"""The kernel that moves weights on GPUs: its arithmetic and its random numbers, by torch and by Triton."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from helpers.command import ROOT
from torch import Tensor

from rsotrain.config.choices import WeightRounding
from rsotrain.instruments.devices import planning_for
from rsotrain.optim.moving import Place, move_all_
from rsotrain.optim.rounding import keys_of
from rsotrain.optim.weights import Weights
from rsotrain.parallel.sharding import Shard
from rsotrain.subspace.projection import Side

BF16 = torch.bfloat16


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(weight: Tensor, update: Tensor, lr: float, *, name: str = "w", step: int = 1) -> Tensor:
    weight = weight.clone()
    place = Place(0, 0, weight.shape[1], *keys_of(0, "weights", name))
    move_all_([weight], [update], lr, 1.0, places=[place], step=keys_of(0, "weights", step))
    return weight


def test_what_is_rounded_stochastically_is_right_on_average() -> None:
    weight, update = noise((200, 100), 1).to(BF16), noise((200, 100), 2)
    exact = weight.double() + 1e-3 * update.double()
    errors = torch.stack([moved(weight, update, 1e-3, step=step).double() - exact for step in range(40)])
    standard_error = float(errors.std()) / errors.numel() ** 0.5
    assert abs(float(errors.mean())) < 4 * standard_error
    # neither rows, nor columns, nor steps go together
    for dims in ((0, 1), (0, 2), (1, 2)):
        of_means = float(errors.mean(dims).std()) * (errors.numel() / errors.mean(dims).numel()) ** 0.5
        assert of_means == pytest.approx(float(errors.std()), rel=0.3)


def test_values_that_bfloat16_has_stay() -> None:
    weight = noise((64, 64), 1).to(BF16)
    weight[0] = 0.0
    for step in range(20):
        assert torch.equal(moved(weight, torch.zeros(64, 64), 1.0, step=step), weight)


def test_each_weight_and_each_step_has_its_own_random_numbers() -> None:
    weight, update = torch.ones(64, 64, dtype=BF16), torch.full((64, 64), 2**-8)
    first = moved(weight, update, 1.0)
    assert torch.equal(first, moved(weight, update, 1.0))
    others = [moved(weight, update, 1.0, name="v"), moved(weight, update, 1.0, step=2)]
    for other in others:  # up or down by chance: half of the places agree
        assert float((first == other).double().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("side", Side)
def test_any_number_of_ranks_rounds_alike(dim: int, side: Side) -> None:
    """Each of three ranks has its rows, or columns, of the weight and rounds them as one rank does."""
    whole, update = noise((12, 9), 1).to(BF16), noise((12, 9), 2)

    def stored(shard: Shard) -> Tensor:
        parameter = shard.of(whole).clone()
        weights = Weights({"w": parameter}, {"w": shard}, WeightRounding.stochastic, seed=3)
        own = shard.of(update).clone()
        weights.add_("w", own if side is Side.right else own.T, 1e-3, 5, decay=0.1, side=side)
        return parameter

    with planning_for("cuda"):
        expected = stored(Shard((12, 9)))
        pieces = [stored(Shard((12, 9), dim, 4 * i, 4 * i + 4)) for i in range(3 if dim == 0 else 2)]
        pieces += [stored(Shard((12, 9), 1, 8, 9))] if dim == 1 else []
    assert torch.equal(torch.cat(pieces, dim), expected)
    assert not torch.equal(expected, whole)


TRITON = """
import torch
from rsotrain.optim import moving
from rsotrain.optim.rounding import keys_of

shapes = [(7, 33), (64, 100), (1, 5)]
step = keys_of(1, "step", 5)
for weight_dtype in (torch.bfloat16, torch.float32):
    for update_dtype in (torch.float32, torch.bfloat16):
        for kept, lr in ((0.0, 1.0), (1.0, 0.01), (0.99, -0.01)):
            for turned in (False, True):
                weights = [torch.randn(*shape).to(weight_dtype) for shape in shapes]
                flat = torch.randn(3 + sum(rows * columns for rows, columns in shapes)).to(update_dtype)
                updates, start = [], 3
                for rows, columns in shapes:
                    own = flat[start : start + rows * columns]
                    start += rows * columns
                    updates.append(own.view(columns, rows).T if turned else own.view(rows, columns))
                places = [moving.Place(3, 4, 200, *keys_of(1, "w", i)) for i in range(3)]
                if weight_dtype is torch.float32:
                    places = [None] * 3
                found, expected = ([w.clone() for w in weights] for _ in range(2))
                moving._move_by_triton(found, updates, places, lr, kept, step)
                for weight, update, place in zip(expected, updates, places):
                    moving._move_by_torch(weight, update, place, lr, kept, step)
                assert all(map(torch.equal, found, expected)), (weight_dtype, update_dtype, kept, turned)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the interpreter of Triton")
def test_triton_s_kernel_is_bitwise_what_torch_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRITON]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "equal", result.stderr
