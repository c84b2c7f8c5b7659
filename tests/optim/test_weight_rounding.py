"""bfloat16 weights that are rounded stochastically: updates arrive, whatever their size and the ranks."""

from dataclasses import replace

import pytest
import torch
from helpers.methods import OF_MATRICES, small
from helpers.runs import compose
from torch import Tensor, nn

from rsotrain.config.choices import WeightRounding
from rsotrain.config.methods import AdamConfig
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.models.build import build_model
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


def weights_moved_by_rso(
    lr: float, rounding: WeightRounding, dtype: torch.dtype, steps: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(before, after) of the 800,000 attention and MLP weights of llama_9m; the gradients are the same."""
    config = compose(["model=llama_9m", "optimizer=rso", f"optimizer.lr={lr}", "optimizer.scale=1"])
    model = build_model(
        config.model, vocab_size=8, precision=Precision.bf16, device=torch.device("cpu"), seed=0
    ).to(dtype)
    optimizer = build_optimizer(
        model,
        replace(config.optimizer, weight_rounding=rounding),
        config.sampler,
        precision=Precision.bf16,
        seed=0,
        total_steps=steps,
    )
    weights = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: w.double() for n, w in weights.items()}
    for step in range(steps):
        for i, holder in enumerate(optimizer.gradient_holders()):
            holder.grad = noise(tuple(holder.shape), 1000 * step + i).to(dtype) + 1
        optimizer.step()
    return {n: (before[n], w.double()) for n, w in weights.items()}


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4, 3e-5, 3e-6])
def test_the_whole_update_of_rso_arrives(lr: float) -> None:
    """The share is a mean over many weights and steps, so that its standard error, the rounding's, is small.

    At 3e-6 a step's update is some 2 % of the distance to the next bfloat16.
    """
    moved = {
        (rounding, dtype): torch.cat([(w - b).flatten() for b, w in found.values()])
        for rounding, dtype in ((NEAREST, torch.float32), (STOCHASTIC, BF16), (NEAREST, BF16))
        for found in [weights_moved_by_rso(lr, rounding, dtype, steps=10)]
    }
    exact, found, lost = moved.values()
    energy = float(exact @ exact)
    share = float(found @ exact) / energy
    standard_error = float((found - exact).square() @ exact.square()) ** 0.5 / energy
    assert standard_error < 0.004
    assert share > 0.99
    assert abs(share - 1) < 3 * standard_error
    if lr <= 3e-5:
        assert float(lost @ exact) / energy < 0.7


@pytest.mark.parametrize("how", ["store", "add", "add_lifted"])
def test_the_mean_displacement_is_right_within_its_standard_error(how: str) -> None:
    """Of 4 million weights, by an update of 2⁻¹¹ of each: a sixteenth to an eighth of the way to the next."""
    start = (1 + noise((2048, 2048), 1).abs() % 1).to(BF16)
    update = start.double() * 2**-11
    low_rank = noise((2048, 4), 2).abs().to(BF16)
    basis = torch.full((2048, 4), 2.0**-11, dtype=BF16)
    if how == "add_lifted":
        update = (low_rank @ basis.T).double()
    p = nn.Parameter(start.clone())
    weights = Weights({"w": p}, {"w": Shard((2048, 2048))}, STOCHASTIC, 5)
    if how == "store":
        weights.store("w", (start.double() + update).float(), 1)
    elif how == "add":
        weights.add_("w", update.float(), 1.0, 1, decay=0.0)
    else:
        weights.add_lifted_("w", low_rank, basis, 1.0, 1, decay=0.0)
    error = p.detach().double() - start.double() - update
    standard_error = float(error.std()) / error.numel() ** 0.5
    assert standard_error < 0.003 * float(update.mean())
    assert abs(float(error.mean())) < 3 * standard_error


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
