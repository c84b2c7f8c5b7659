"""Moments in 8 bits: how well they are kept, that they follow, and that ranks keep the same."""

from dataclasses import replace

import pytest
import torch
from helpers.methods import OF_MATRICES, small
from torch import Tensor, nn

from rsotrain.config.choices import StateDtype
from rsotrain.config.methods import AdamConfig
from rsotrain.errors import UserError
from rsotrain.optim.adamw import AdamW
from rsotrain.optim.base import Settings, StateKeeper
from rsotrain.optim.blocks import (
    block_size,
    by_blocks,
    decode,
    encode_signed_,
    encode_unsigned_,
    scales_shape,
)
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.coded import CodedMoment, encode, widened
from rsotrain.parallel.sharding import Shard

ADAM = AdamConfig(name="adam", lr=0.01)
INT8 = StateKeeper(torch.int8, 5)


def spread(rows: int, columns: int, decades: float, seed: int = 0) -> Tensor:
    """Normal columns whose sizes lie ``decades`` apart, as those of a projected gradient do."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(0, -decades, columns)


def random_int32(shape: tuple[int, ...], seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=random)


def test_first_moments_are_rounded_to_the_nearest_code() -> None:
    values = spread(64, 256, 2)
    codes, scales = encode_signed_(by_blocks(values.clone(), 1, 256))
    found = decode(codes, scales, unsigned=False).view_as(values)
    largest = values.abs().amax(1, keepdim=True)
    # half a step of the root is 1/254 of the largest root, and d(w²) = 2w dw
    bound = 2 * (values.abs() / largest).sqrt() / 254 + 254**-2
    assert bool(((found - values).abs() <= 1.001 * bound * largest).all())
    torch.testing.assert_close(found.abs().amax(1, keepdim=True), largest)
    assert codes.abs().max() == 127


def test_second_moments_are_rounded_without_a_bias_and_never_to_zero() -> None:
    values = spread(64, 128, 3).square()
    total, draws = torch.zeros_like(values), 400
    for draw in range(draws):
        random = random_int32((64, 128, 1), draw)
        codes, scales = encode_unsigned_(by_blocks(values.clone(), 1, 128), random)
        found = decode(codes, scales, unsigned=True).view_as(values)
        total += found
        assert bool((found[values > 0] > 0).all())
    levels = (values / values.amax(1, keepdim=True)).pow(0.25) * 255
    inside = levels > 1  # the lowest step rounds up
    assert 0.9 < float(inside.float().mean()) < 1
    errors = ((total / draws - values) / values)[inside]
    # one rounding errs by at most a step, 4/level of the value; the mean of all by far less
    step = (4 / levels + 6 / levels**2 + 4 / levels**3)[inside]
    assert bool((errors.abs() <= 5 * step / 2 / draws**0.5 + 1e-5).all())
    assert abs(float(errors.mean())) < 5e-4


def test_zeros_and_extremes_are_kept() -> None:
    for value in (0.0, 1e-30, 1e30):
        values = torch.full((2, 64, 1), value)
        codes, scales = encode_unsigned_(values.clone(), random_int32((2, 64, 1), 0))
        torch.testing.assert_close(decode(codes, scales, unsigned=True), values, rtol=1e-5, atol=0)
        codes, scales = encode_signed_(-values.clone())
        torch.testing.assert_close(decode(codes, scales, unsigned=False), -values, rtol=1e-5, atol=0)


def test_a_second_moment_does_not_freeze() -> None:
    """V after gradients of 1 for 500 steps, then of 0.1 for 1000; one entry of each row keeps 1."""
    found = {}
    for dtype in (torch.float32, torch.int8):
        p = {"w": nn.Parameter(torch.zeros(200, 10))}
        group = AdamW("all", p, 0.0, Settings(StateKeeper(dtype, 5)), ADAM)
        for step in range(1, 1501):
            gradient = torch.full((200, 10), 1.0 if step <= 500 else 0.1)
            gradient[:, 0] = 1.0
            p["w"].grad = gradient
            group.update(step, 1.0)
        moment = group.moments["w"]["exp_avg_sq"]
        found[dtype] = group.keeper.read([moment])[0][:, 1:]
    # Each entry errs by some 20 %, the mean of 1800 by 0.5 %. To nearest all would be off by the factor 2.6.
    ratio = found[torch.int8] / found[torch.float32]
    assert abs(float(ratio.mean()) - 1.0) < 0.02
    assert float(ratio.std()) < 0.3


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("unsigned", [False, True])
def test_pieces_keep_what_the_whole_keeps(dim: int, unsigned: bool) -> None:
    """Cut across the blocks into uneven pieces, and converted together with another moment."""
    shape = (24, 40)
    size = block_size(shape, dim)
    assert size == shape[dim]
    values = spread(*shape, 1)
    values = values.square() if unsigned else values

    def coded(piece: Tensor, start: int) -> CodedMoment:
        starts = (start, 0) if dim == 1 else (0, start)
        return CodedMoment.zeros(
            piece.shape, shape, starts, dim, size, unsigned=unsigned, label="w.m", device=torch.device("cpu")
        )

    whole = coded(values, 0)
    encode([whole], values.clone(), 3, "1.")
    for pieces in (2, 4, 7):
        start = 0
        for piece in values.chunk(pieces, 1 - dim):
            own = coded(piece, start)
            encode([own], piece.clone(), 3, "1.")
            expected = whole.codes.narrow(1 - dim, start, piece.shape[1 - dim])
            assert torch.equal(own.codes, expected)
            start += piece.shape[1 - dim]
    ((_, buffer),) = widened([whole])
    error = (buffer - values).abs().max() / values.abs().max()
    assert float(error) < 0.02
    if dim == 1:
        both = [coded(values, 0), replace(coded(values, 0), label="other")]
        ((indices, buffer),) = widened(both)
        assert (indices, buffer.shape) == ([0, 1], (48, 40))
        encode(both, torch.cat([values, values]), 3, "1.")
        assert torch.equal(both[0].codes, whole.codes)
        assert torch.equal(both[1].codes, whole.codes) is not unsigned  # other random numbers


def test_what_has_no_blocks_stays_in_float32() -> None:
    assert block_size((1000,), 0) is None
    assert block_size((1000, 1), 1) is None
    assert block_size((1000, 7), 1) is None
    assert block_size((1000, 8), 1) == 8
    assert block_size((1000, 1376), 1) == 172
    assert scales_shape((1000, 1376), 1, 172) == (1000, 8)
    parameters = {"gain": nn.Parameter(torch.zeros(64)), "w": nn.Parameter(torch.zeros(64, 512))}
    group = AdamW("all", parameters, 0.0, Settings(INT8), ADAM)
    assert {t.dtype for t in group.state["gain"].values()} == {torch.float32}
    kept = {key: (t.dtype, tuple(t.shape)) for key, t in group.state["w"].items()}
    # the wider dimension is that which ranks share, so blocks lie along the other
    assert kept == {
        "exp_avg": (torch.int8, (64, 512)),
        "exp_avg_scale": (torch.float32, (1, 512)),
        "exp_avg_sq": (torch.uint8, (64, 512)),
        "exp_avg_sq_scale": (torch.float32, (1, 512)),
    }


def test_ranks_that_would_cut_blocks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks cannot share 64 columns, so that each has some rows."""
    monkeypatch.setattr(Shard, "pieces", property(lambda self: 3))
    shard = Shard((16, 64), 0, 0, 6)
    monkeypatch.setattr("rsotrain.optim.base.shard_of", lambda parameter: shard)
    with pytest.raises(UserError, match=r"moments in 8 bits: 3 ranks share the 16 rows of w, as its 64"):
        AdamW("all", {"w": nn.Parameter(torch.zeros(6, 64))}, 0.0, Settings(INT8), ADAM)


@pytest.mark.parametrize("name", OF_MATRICES)
def test_updates_are_near_those_of_float32_states(name: str) -> None:
    """60 steps of 40 × 24 and 24 × 40 with noisy gradients, and refreshes, some with transport."""
    config, sampler = small(name, rank=8, gap=20, lr=0.01, scale=1.0)
    finals: dict[StateDtype, Tensor] = {}
    for dtype in (StateDtype.float32, StateDtype.int8):
        shapes = {"w0": (40, 24), "w1": (24, 40)}
        parameters = {n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
        own = replace(config, name=name, block_parameters=["w"], state_dtype=dtype)
        optimizer = build_optimizer(parameters.items(), own, sampler, seed=0, total_steps=60)
        for step in range(60):
            for i, parameter in enumerate(parameters.values()):
                mean = spread(40, 24, 0.5, seed=i)
                gradient = mean + spread(40, 24, 0.5, seed=10 + 2 * step + i)
                parameter.grad = (gradient if i == 0 else gradient.T).contiguous()
            optimizer.step()
        finals[dtype] = torch.cat([p.data.flatten() for p in parameters.values()])
    full, coded = finals.values()
    # Errors of 2 to 6 % in each update, which add up at random. Signs of a residual that is close to 0 turn,
    # and LDAdam's basis, a new one each step, turns with the momentum that it is drawn from.
    bound = {"frugal": 0.15, "carry": 0.15, "ldadam": 0.15}.get(name, 0.05)
    assert float((coded - full).norm() / full.norm()) < bound
