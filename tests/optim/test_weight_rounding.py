"""bfloat16 weights that are rounded stochastically: updates arrive, whatever their size and the ranks."""

from dataclasses import replace

import pytest
import torch
from helpers import rso_toy
from helpers.methods import OF_MATRICES, small
from torch import Tensor, nn

from rsotrain.config.methods import AdamConfig, WeightRounding
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.weights import Weights
from rsotrain.parallel.sharding import Shard
from rsotrain.subspace.projection import Side

STOCHASTIC, NEAREST = WeightRounding.stochastic, WeightRounding.nearest
BF16 = torch.bfloat16


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def displaced(name: str, dtype: torch.dtype, rounding: WeightRounding, lr: float, steps: int) -> Tensor:
    """What ``steps`` steps with the same gradients add to weights of 1 to 2, one after the other."""
    config, sampler = small(name, rank=8, gap=10, lr=lr, scale=1.0, weight_rounding=rounding)
    config = replace(config, name=name, block_parameters=["w"])
    start = {n: (1 + noise(s, 1).abs() % 1).to(BF16) for n, s in (("w0", (96, 32)), ("w1", (32, 96)))}
    parameters = {n: nn.Parameter(w.to(dtype, copy=True)) for n, w in start.items()}
    optimizer = build_optimizer(
        parameters.items(), config, sampler, precision=Precision.bf16, seed=2, total_steps=steps
    )
    for step in range(steps):
        for i, parameter in enumerate(parameters.values()):
            gradient = noise(parameter.shape, 5 + i) + noise(parameter.shape, 50 + 2 * step + i)
            parameter.grad = gradient.to(BF16).to(dtype)
        optimizer.step()
    return torch.cat([(p.data.double() - start[n].double()).flatten() for n, p in parameters.items()])


@pytest.mark.parametrize("name", OF_MATRICES)
def test_small_updates_arrive_on_average(name: str) -> None:
    """Updates of about 2⁻¹¹ of a weight, a sixteenth to an eighth of the way to the next bfloat16."""
    lr, steps = 2**-11 * (5 if name == "sn" else 1), 20  # those of SN are √subset_size times smaller
    exact = displaced(name, torch.float32, NEAREST, lr, steps)
    found = displaced(name, BF16, STOCHASTIC, lr, steps)
    standard_error = float((found - exact).std())
    assert abs(float((found - exact).mean())) < 4 * standard_error / exact.numel() ** 0.5
    share = float((found @ exact) / (exact @ exact))
    assert abs(share - 1) < 4 * standard_error / float(exact.norm()) + 0.01  # bases turn with what they see
    if name in ("adam", "galore"):
        lost = displaced(name, BF16, NEAREST, lr, steps)
        assert float((lost @ exact) / (exact @ exact)) < 0.8


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4, 3e-5])
def test_the_whole_update_of_rso_arrives(lr: float) -> None:
    shares = []
    for rounding in (STOCHASTIC, NEAREST):
        sums = torch.zeros(2, dtype=torch.float64)
        for seed in range(6):
            moved = []
            for dtype, own in ((torch.float32, NEAREST), (BF16, rounding)):
                model = rso_toy.Toy(torch.float32).to(BF16).to(dtype)
                config = rso_toy.config(weight_rounding=own, update_proj_gap=100, lr=lr)
                optimizer = rso_toy.build(model, config, precision=Precision.bf16, seed=seed)
                weights = {n: p for n, p in model.named_parameters() if not p.requires_grad}
                before = {n: p.double() for n, p in weights.items()}
                for step in range(20):
                    for i, holder in enumerate(optimizer.groups[0].gradient_holders().values()):
                        holder.grad = noise(holder.shape, 100 * step + i).to(dtype) + 1
                    for p in model.parameters():
                        p.grad = torch.zeros_like(p) if p.requires_grad else None
                    optimizer.step()
                moved.append(torch.cat([(p.double() - before[n]).flatten() for n, p in weights.items()]))
            exact, found = moved
            sums += torch.stack([found @ exact, exact @ exact])
        shares.append(float(sums[0] / sums[1]))
    # 500 weights × 6 seeds; at 3e-5 each moves by some 2 % of a step of bfloat16 in 20 steps
    assert shares[0] == pytest.approx(1, abs=0.01 if lr >= 1e-3 else 0.15)
    if lr <= 1e-4:
        assert shares[1] < 0.7


def test_weight_decay_reaches_rows_without_a_gradient() -> None:
    """(1 − 0.002·0.1)¹²⁰ = 0.97628 of their norm, not all of it."""
    embedding = nn.Parameter(noise((400, 64), 3).to(BF16))
    before = embedding.detach().double().norm(dim=1)
    config = AdamConfig(
        "adam", 0.002, weight_decay=0.1, weight_rounding=STOCHASTIC, block_parameters=["embedding"]
    )
    optimizer = build_optimizer(
        [("embedding", embedding)],
        config,
        NoSamplerConfig("none"),
        precision=Precision.bf16,
        seed=0,
        total_steps=1,
    )
    for _ in range(120):
        embedding.grad = torch.zeros_like(embedding)
        optimizer.step()
    kept = embedding.detach().double().norm(dim=1) / before
    assert float(kept.mean()) == pytest.approx((1 - 0.002 * 0.1) ** 120, abs=2e-4)


@pytest.mark.parametrize(("shape", "dim"), [((24, 10), 0), ((10, 24), 1), ((10, 24), 0)])
def test_pieces_are_rounded_as_the_whole_is(shape: tuple[int, int], dim: int) -> None:
    """Also uneven and empty ones, by each of the three ways to write a weight."""
    side = Side.right if shape[0] >= shape[1] else Side.left
    start, value = noise(shape, 0).to(BF16), noise(shape, 1) * 1e-3
    low_rank = torch.randint(-4, 4, (24, 3), generator=torch.Generator().manual_seed(2)).to(BF16)
    basis = torch.randint(-4, 4, (10, 3), generator=torch.Generator().manual_seed(3)).to(BF16)

    def written(part: slice) -> list[Tensor]:
        def cut(whole: Tensor) -> Tensor:
            return whole[part] if dim == 0 else whole[:, part]

        results = []
        for how in range(3):
            piece = cut(start).clone()
            shard = Shard(shape, dim, part.start, part.stop)
            weights = Weights({"w": piece}, {"w": shard}, STOCHASTIC, 7)
            if how == 0:
                weights.store("w", cut(start.float() + value), 5)
            elif how == 1:
                update = cut(value) if side is Side.right else cut(value).T
                weights.add_("w", update.clone(), 0.7, 5, decay=0.01, side=side)
            else:
                rows = part if (side is Side.right) == (dim == 0) else slice(None)
                columns = slice(None) if (side is Side.right) == (dim == 0) else part
                weights.add_lifted_("w", low_rank[rows], basis[columns], 1e-4, 5, decay=0.01, side=side)
            assert piece.numel() < 20 or not torch.equal(piece, cut(start))
            results.append(piece)
        return results

    whole = written(slice(0, shape[dim]))
    for pieces in (2, 4, 5):
        chunk = -(-shape[dim] // pieces)
        for begin in range(0, shape[dim], chunk):
            part = slice(begin, min(begin + chunk, shape[dim]))
            for own, expected in zip(written(part), whole, strict=True):
                assert torch.equal(own, expected[part] if dim == 0 else expected[:, part])


def test_float32_weights_and_nearest_have_no_random_numbers() -> None:
    for dtype, rounding in ((torch.float32, STOCHASTIC), (BF16, NEAREST)):
        p = nn.Parameter(torch.zeros(4, 4, dtype=dtype))
        assert Weights({"w": p}, {"w": Shard((4, 4))}, rounding, 0).factors("w", 1) is None
