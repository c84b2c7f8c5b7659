"""LoRA and ReLoRA against the papers in float64, in their limits, and ReLoRA's clock."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.methods import small
from helpers.runs import compose, trainer
from helpers.variations import TINY, batch, random_model
from torch import Tensor
from torch.func import functional_call

from rsotrain.config.choices import Pruning, WeightRounding
from rsotrain.errors import UserError
from rsotrain.models.llama import Llama
from rsotrain.models.lora_linear import factor_names
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.lora import ReLoRA
from rsotrain.training.composition import check_composition

LR, BETAS, EPS, RANK, ALPHA, GAP = 0.01, (0.9, 0.99), 1e-8, 4, 6.0, 3
OF_ONE = r"layers\.0\.mlp\.(up|down)_proj\.weight$"  # 88 x 32 and 32 x 88


def wide() -> Llama:
    model = random_model(TINY).double()
    model.model.compute_dtype = torch.float64
    return model


def built(name: str, model: Llama, **settings: object) -> CompositeOptimizer:
    shared: dict[str, object] = {"lr": LR, "betas": BETAS, "eps": EPS, "scale": 1.0}
    shared |= {"block_parameters": [OF_ONE]} | ({} if name == "adam" else {"alpha": ALPHA})
    config, sampler = small(name, rank=RANK, gap=GAP, **shared)
    return build_optimizer(model, replace(config, **settings), sampler, seed=7, total_steps=99)  # type: ignore[arg-type]


def train(model: Llama, optimizer: CompositeOptimizer, steps: int) -> None:
    for _ in range(steps):
        model(*batch()).backward()
        optimizer.step()
        optimizer.zero_grad()


class Adam:
    """Kingma & Ba, with a count that the caller keeps."""

    def __init__(self, shape: torch.Size) -> None:
        self.m, self.v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    def update(self, gradient: Tensor, count: int) -> Tensor:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        return (self.m / (1 - BETAS[0] ** count)) / ((self.v / (1 - BETAS[1] ** count)).sqrt() + EPS)

    def prune(self, ratio: float) -> None:
        kept = torch.ones_like(self.m, dtype=torch.bool)
        for moment in (self.m, self.v):
            smallest = moment.abs().flatten().argsort()[: round(ratio * moment.numel())]
            kept.view(-1)[smallest] = False
        self.m, self.v = self.m * kept, self.v * kept


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_training_is_the_papers(name: str) -> None:
    """8 steps with two merges, from the gradient of W alone: dB = s dW Aᵀ, dA = s Bᵀ dW.

    Of a merge the new A are taken as they are; that they are uniform is another test's.
    """
    ours, plain, steps = wide(), wide(), 8
    own: dict[str, Any] = {"restart_warmup_steps": 2, "prune_ratio": 0.7} if name == "relora" else {}
    optimizer = built(name, ours, **own)
    now = dict(ours.named_parameters())
    values = {n: p.detach().clone() for n, p in plain.named_parameters()}
    factors = {
        n: [now[f].detach().clone() for f in factor_names(n)] for n in values if factor_names(n)[0] in now
    }
    assert len(factors) == 2
    moments = {n: [Adam(f.shape) for f in own] for n, own in factors.items()}
    rest = {n: Adam(p.shape) for n, p in values.items() if n not in factors}
    scale = ALPHA / RANK
    for step in range(1, steps + 1):
        merges, since = divmod(step - 1, GAP)
        lr = LR * (1.0 if name == "lora" or merges == 0 else min(1.0, (since + 1) / 3))
        optimizer.set_lr_factor(optimizer.rate_factor(step))  # as the trainer does
        train(ours, optimizer, 1)
        given = {
            n: (v + scale * factors[n][1] @ factors[n][0] if n in factors else v).requires_grad_()
            for n, v in values.items()
        }
        functional_call(plain, given, batch()).backward()
        for n, own in factors.items():
            A, B = own
            G = given[n].grad
            assert G is not None
            gradients = (scale * B.T @ G, scale * G @ A.T)
            factors[n] = [
                f - lr * adam.update(g, step) for f, adam, g in zip(own, moments[n], gradients, strict=True)
            ]
        for n, adam in rest.items():
            G = given[n].grad
            assert G is not None
            values[n] = values[n].detach() - lr * adam.update(G, step)
        if name == "relora" and step % GAP == 0:
            for n, (A, B) in factors.items():
                values[n] = values[n] + scale * B @ A
                factors[n] = [now[factor_names(n)[0]].detach().clone(), torch.zeros_like(B)]
                for adam in moments[n]:
                    adam.prune(0.7)
        for n, (A, B) in factors.items():
            # norms have float32 statistics, which bounds the agreement
            torch.testing.assert_close(now[n].detach(), values[n], rtol=1e-6, atol=1e-7)
            for factor, value in zip(factor_names(n), (A, B), strict=True):
                torch.testing.assert_close(now[factor].detach(), value, rtol=1e-5, atol=1e-6)
    for n in rest:
        torch.testing.assert_close(now[n].detach(), values[n].detach(), rtol=1e-5, atol=1e-6)


def test_at_full_rank_with_one_factor_held_at_the_identity_it_is_adam() -> None:
    """W + B·I for a tall matrix, W + I·A for a broad one: the trained factor has W's own gradient."""
    ours, theirs = wide(), wide()
    optimizer = built("lora", ours, rank=1.0, alpha=32.0)  # r is 32, so s = 1
    now = dict(ours.named_parameters())
    held = []
    tall, broad = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("up", "down"))
    with torch.no_grad():
        for name, which in ((tall, 0), (broad, 1)):
            both = [now[factor] for factor in factor_names(name)]
            both[which].copy_(torch.eye(32))
            both[1 - which].zero_()
            held.append(both[which])
    adam = built("adam", theirs)
    for _ in range(6):
        ours(*batch()).backward()
        for factor in held:
            assert factor.grad is not None
            factor.grad.zero_()
        optimizer.step()
        optimizer.zero_grad()
        train(theirs, adam, 1)
    expected = dict(theirs.named_parameters())
    for name in (tall, broad):
        A, B = (now[factor].detach() for factor in factor_names(name))
        moved = expected[name].detach() - now[name].detach()
        assert moved.norm() > 0.1
        torch.testing.assert_close(B @ A, moved, rtol=1e-6, atol=1e-7)  # as above


def test_before_its_first_merge_relora_is_lora() -> None:
    lora, relora = random_model(TINY), random_model(TINY)
    train(lora, built("lora", lora), 4)
    train(relora, built("relora", relora, merge_every=5), 4)
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), relora.parameters(), strict=True))


def test_a_merge_keeps_the_function_and_draws_anew() -> None:
    model = random_model(TINY)
    optimizer = built("relora", model, merge_every=4, block_parameters=[r"_proj\.weight$"], rank=16)
    relora = optimizer.groups[0]
    assert isinstance(relora, ReLoRA)
    train(model, optimizer, 3)
    before = model(*batch()).item()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name in relora.adapted:
            relora._merge(name, 4)
    assert model(*batch()).item() == pytest.approx(before, rel=1e-6)  # float32
    for name, layer in relora.adapted.items():
        assert not torch.equal(layer.weight, old[name])
        bound = layer.lora_A.shape[1] ** -0.5
        assert 0.95 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not torch.equal(layer.lora_A, old[factor_names(name)[0]])
        assert layer.lora_B.abs().max() == 0
    drawn = [layer.lora_A.flatten()[:8] for layer in relora.adapted.values()]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


@pytest.mark.parametrize("pruning", Pruning)
@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
def test_moments_are_pruned_together(pruning: Pruning, ratio: float) -> None:
    model = random_model(TINY)
    optimizer = built("relora", model, merge_every=3, pruning=pruning, prune_ratio=ratio, rank=32)
    train(model, optimizer, 2)
    model(*batch()).backward()
    relora = optimizer.groups[0]
    optimizer.step()
    for factor, own in relora.state.items():
        first, second = own["exp_avg"] != 0, own["exp_avg_sq"] != 0
        assert torch.equal(first, second), factor
        share = 1.0 - first.double().mean().item()
        if ratio in (0.0, 1.0):
            assert share == ratio
        else:  # in magnitude an entry is to be among the largest of both moments
            assert 0.89 < share <= (0.98 if pruning is Pruning.magnitude else 0.91)


def test_bfloat16_weights_are_merged_without_bias() -> None:
    """Of a product that is a quarter of a step of W nothing arrives to nearest, on average all of it."""
    means = []
    for rounding in (WeightRounding.nearest, WeightRounding.stochastic):
        model = random_model(TINY).to(torch.bfloat16)
        optimizer = built("relora", model, weight_rounding=rounding, alpha=float(RANK))
        relora = optimizer.groups[0]
        assert isinstance(relora, ReLoRA)
        name, layer = next(iter(relora.adapted.items()))
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.lora_A.fill_(1.0)
            layer.lora_B.fill_(2.0**-9 / RANK)  # s = 1: W + 2⁻⁹, where steps are of 2⁻⁷
            relora._merge(name, 1)
        means.append((layer.weight.float() - 1.0).mean().item())
    assert means[0] == 0.0
    # 2816 entries that are 2⁻⁷ with probability 1/4: six standard deviations are 20 %
    assert means[1] == pytest.approx(2.0**-9, rel=0.2)


def test_the_rate_is_jagged_for_all_weights_and_is_logged(tiny: list[str], cache_dir: Path) -> None:
    own = [
        "optimizer=relora",
        "optimizer.merge_every=3",
        "optimizer.restart_warmup_steps=2",
        "optimizer.lr=0.5",
    ]
    jagged = trainer(
        [*tiny, *own, "lr_scheduler=linear", "lr_scheduler.warmup_steps=0", "steps=8"], cache_dir
    )
    factors = [1, 1, 1, 1 / 3, 2 / 3, 1, 1 / 3, 2 / 3]
    for done, factor in enumerate(factors):
        assert jagged.lr == pytest.approx(0.5 * (1 - done / 8) * factor)
        before = jagged.model.lm_head.weight.detach().clone()
        jagged.train_step()
        assert jagged.last_lr == jagged.lr_of(done)
        if done == 0:  # Adam's first step is at the rate
            moved = (jagged.model.lm_head.weight.detach() - before).abs().max().item()
            assert moved == pytest.approx(0.5, rel=0.01)
    assert trainer([*tiny, "optimizer=lora"], cache_dir).optimizer.rate_factor(5) == 1.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["optimizer.merge_every=4", "optimizer.restart_warmup_steps=4"],
            "restart_warmup_steps=4 must be less",
        ),
        (["optimizer.prune_ratio=1.5"], "prune_ratio=1.5"),
        (["optimizer.alpha=0"], "alpha=0"),
        (["optimizer.rank=65"], "rank=65 is larger"),
        (["sampler=svd"], "sampler=svd would do nothing"),
        (["optimizer.block_parameters=[lm_head]"], "can have no adapter"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_composition(compose(["model=llama_tiny", "optimizer=relora", *settings]))
