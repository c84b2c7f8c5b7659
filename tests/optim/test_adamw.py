"""AdamW and Muon against torch's, and bfloat16 state against float32."""

import pytest
import torch
from torch import Tensor, nn

from rsotrain.config.methods import AdamConfig, MuonConfig
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.optim.adamw import AdamW
from rsotrain.optim.base import Settings, StateKeeper
from rsotrain.optim.buckets import BUCKET_ELEMENTS, buckets
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.rounding import stochastic_round_

SHAPES = [(7, 5), (16, 3), (11,), (4, 4)]

ADAM = AdamConfig(name="adam", lr=0.01)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(3)
    return {f"p{i}": nn.Parameter(torch.randn(s, generator=random).to(dtype)) for i, s in enumerate(SHAPES)}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=random).to(p.dtype)


def test_float32_is_bitwise_torch_fused_adamw_state_included() -> None:
    ours, theirs = parameters(), parameters()
    group = AdamW("all", ours, 0.01, Settings(StateKeeper(torch.float32, 0), (0.9, 0.95), 1e-8, 0.1), ADAM)
    expected = torch.optim.AdamW(
        theirs.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    for step in range(1, 6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        expected.param_groups[0]["lr"] = 0.01 / step
        group.update(step, 1.0 / step)
        expected.step()
        for name in ours:
            assert torch.equal(ours[name], theirs[name])
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(group.state[name][kind], expected.state[theirs[name]][kind])


def test_muon_is_bitwise_torch_muon() -> None:
    shapes = [(7, 5), (5, 16)]
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=random) for s in shapes]
    ours = {f"p{i}": nn.Parameter(w.clone()) for i, w in enumerate(start)}
    theirs = [nn.Parameter(w.clone()) for w in start]
    config = MuonConfig(name="muon", lr=0.02, scale=0.5, weight_decay=0.1, block_parameters=["p"])
    optimizer = build_optimizer(ours.items(), config, NoSamplerConfig(name="none"), seed=0, total_steps=5)
    expected = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for p, q in zip(ours.values(), theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
    for p, q in zip(ours.values(), theirs, strict=True):
        assert torch.equal(p, q)


def test_bfloat16_weights_are_the_float32_update_rounded_to_nearest() -> None:
    ours = parameters(torch.bfloat16)
    group = AdamW("all", ours, 0.01, Settings(StateKeeper(torch.float32, 0)), ADAM)
    wide = {name: nn.Parameter(p.data.float()) for name, p in ours.items()}
    other = AdamW("all", wide, 0.01, Settings(StateKeeper(torch.float32, 0)), ADAM)
    for step in range(1, 4):
        set_gradients(ours, step)
        for name in ours:
            wide[name].data.copy_(ours[name].data)
            wide[name].grad = ours[name].grad.float()
        group.update(step, 1.0)
        other.update(step, 1.0)
        for name in ours:
            assert torch.equal(ours[name].data, wide[name].data.bfloat16())
            assert group.state[name]["exp_avg_sq"].dtype is torch.float32


def _second_moments(dtype: torch.dtype) -> Tensor:
    """V after gradients of 1 for 500 steps, then of 0.1 for 1000."""
    p = {"w": nn.Parameter(torch.zeros(200, 10))}
    group = AdamW("all", p, 0.0, Settings(StateKeeper(dtype, 5)), ADAM)
    for step in range(1, 1501):
        p["w"].grad = torch.full((200, 10), 1.0 if step <= 500 else 0.1)
        group.update(step, 1.0)
    return group.state["w"]["exp_avg_sq"].float()


def test_bfloat16_second_moment_does_not_freeze() -> None:
    exact = _second_moments(torch.float32)
    rounded = _second_moments(torch.bfloat16)
    # Unbiased rounding: the mean over 2000 entries errs by the spread of one entry, some 5 %, over √2000.
    assert abs(float(rounded.mean() / exact.mean()) - 1.0) < 0.01
    # And rounding to nearest does freeze: v·0.999 is v again.
    v = exact.max().bfloat16()
    assert torch.equal(v * 0.999, v)


def test_stochastic_rounding_is_unbiased_exact_on_bfloat16_and_seeded() -> None:
    values = torch.tensor([1.0 + 1.0 / 512, -3.0 - 1.0 / 256, 1e-30, 0.0]).repeat(20000, 1)
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    stochastic_round_(out, values, torch.Generator().manual_seed(0))
    below, above = values.bfloat16().float() * 0.99, values.bfloat16().float() * 1.01
    assert bool(((out.float() - values).abs() <= (above - below).abs()).all())
    # 1 + 1/512 lies a quarter of the way from 1 to 1 + 1/128: frequency 0.25 ± 4 · 0.003
    assert abs(float((out[:, 0] > 1.0).float().mean()) - 0.25) < 0.013
    assert bool((out[:, 3] == 0).all())
    again = torch.empty_like(out)
    stochastic_round_(again, values, torch.Generator().manual_seed(0))
    assert torch.equal(out, again)
    exact = torch.randn(1001).bfloat16()
    kept = torch.empty_like(exact)
    stochastic_round_(kept, exact.float(), torch.Generator().manual_seed(1))
    assert torch.equal(kept, exact)


def test_buckets_bound_the_temporaries() -> None:
    sizes = [5, 5, 20, 1, 1, 9]
    groups = buckets(sizes, lambda size: size, limit=10)
    assert groups == [[5, 5], [20], [1, 1], [9]]
    assert BUCKET_ELEMENTS * 4 == 32 * 2**20


def test_missing_gradient_is_an_error_naming_the_parameter() -> None:
    group = AdamW("all", parameters(), 0.01, Settings(StateKeeper(torch.float32, 0)), ADAM)
    with pytest.raises(RuntimeError, match="p0 has no gradient"):
        group.update(1, 1.0)
