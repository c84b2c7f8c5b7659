"""optimizer.rest: embedding and head by another rule, the rest of the rest by Adam."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.runs import compose
from torch import Tensor, nn

from rsotrain.config.choices import RestRule, StateDtype
from rsotrain.config.identity import identity, run_name
from rsotrain.config.methods import OPTIMIZERS, OptimizerConfig
from rsotrain.config.schema import Config
from rsotrain.errors import UserError
from rsotrain.models.build import build_model
from rsotrain.optim.base import Settings
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.moments import StateKeeper
from rsotrain.optim.registered import method_of

VOCAB, HIDDEN = 48, 64
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
COMMON = ["model=llama_tiny", "optimizer=galore", "precision=fp32"]


@cache
def composed(*more: str) -> Config:
    return compose([*COMMON, *more])


def built(rule: RestRule, *more: str, **own: object) -> tuple[nn.Module, CompositeOptimizer]:
    config = composed(*more)
    optimizer = replace(config.optimizer, rest=rule, **own)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    model = build_model(config.model, vocab_size=VOCAB, precision=config.precision, device=cpu, seed=0)
    return model, build_optimizer(
        model, optimizer, config.sampler, precision=config.precision, seed=5, total_steps=10
    )


def train(model: nn.Module, optimizer: CompositeOptimizer, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=random)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def alone(config: OptimizerConfig, parameters: dict[str, nn.Parameter], steps: range) -> dict[str, Tensor]:
    """Trained by a method's own class, with the gradients that ``train`` gives them."""
    model, _ = built(RestRule.adam)
    order = [name for name, _ in model.named_parameters()]
    keeper = StateKeeper(torch.float32, 5)
    method = method_of(config)("alone", parameters, config.lr, Settings(keeper), config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for name in order:
            gradient = torch.randn(shapes[name], generator=random)
            if name in parameters:
                parameters[name].grad = gradient
        method.update(step, 1.0)
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("rule", ["adam_mini", "foam", "lion", "scale"])
def test_embedding_and_head_have_the_rule_and_norms_have_adam(rule: str) -> None:
    model, optimizer = built(RestRule[rule])
    start, _ = built(RestRule.adam)
    train(model, optimizer, range(1, 4))
    parameters = dict(start.named_parameters())
    lr = optimizer.groups[-1].peak_lr
    own = OPTIMIZERS[rule](name=rule, lr=lr)
    found = dict(model.named_parameters())
    expected = alone(own, {name: parameters[name] for name in (EMBEDDING, HEAD)}, range(1, 4))
    adam = OPTIMIZERS["adam"](name="adam", lr=lr)
    expected |= alone(adam, {NORM: parameters[NORM]}, range(1, 4))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [group.label for group in optimizer.groups] == ["galore", f"rest: {rule}", "rest: adam"]


def test_adam8bit_is_what_int8_states_make_of_adam() -> None:
    """The rest is that of state_dtype=int8, and the blocks are those of float32 states."""
    models = {}
    for name, rule, dtype in (
        ("8bit", RestRule.adam8bit, StateDtype.float32),
        ("int8", RestRule.adam, StateDtype.int8),
        ("full", RestRule.adam, StateDtype.float32),
    ):
        model, optimizer = built(rule, state_dtype=dtype)
        train(model, optimizer, range(1, 4))
        models[name] = dict(model.named_parameters())
    for name, value in models["8bit"].items():
        as_int8, as_full = (torch.equal(value, models[key][name]) for key in ("int8", "full"))
        of_matrices = name in (EMBEDDING, HEAD)
        assert (as_int8, as_full) == ((True, False) if of_matrices else (value.ndim == 1, True)), name


N = VOCAB * HIDDEN
# Bytes for embedding and head together. Blocks of adam8bit lie in rows: 64 elements have a scale of 4 bytes.
FORMULAS: dict[RestRule, Callable[[], int]] = {
    RestRule.adam: lambda: 2 * 8 * N,
    RestRule.adam8bit: lambda: 2 * 2 * (N + 4 * N // 48),
    RestRule.adam_mini: lambda: 2 * 4 * (N + VOCAB),
    RestRule.foam: lambda: 2 * 8 * N // 4,
    RestRule.lion: lambda: 2 * 4 * N,
    RestRule.scale: lambda: 4 * N,
}


@pytest.mark.parametrize("rule", RestRule)
def test_the_state_is_as_large_as_stated(rule: RestRule) -> None:
    _, optimizer = built(rule)
    norms = 8 * 5 * HIDDEN
    assert sum(group.state_bytes() for group in optimizer.groups[1:]) == norms + FORMULAS[rule]()


@pytest.mark.parametrize("rule", [rule for rule in RestRule if rule is not RestRule.adam])
def test_a_resumed_run_is_the_uninterrupted_run_bitwise(rule: RestRule) -> None:
    more = ["precision=bf16", "optimizer.update_proj_gap=2", "optimizer.weight_decay=0.1"]
    model, optimizer = built(rule, *more)
    train(model, optimizer, range(1, 4))
    stream = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    other, resumed = built(rule, *more)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for one, its in ((model, optimizer), (other, resumed)):
        train(one, its, range(4, 7))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_weight_decay_leaves_embedding_and_head_alone_with_every_rule() -> None:
    for rule in RestRule:
        model, optimizer = built(rule, weight_decay=0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) is ("proj" not in name), (rule, name)


@pytest.mark.parametrize(
    ("rule", "more", "message"),
    [
        (RestRule.adam8bit, ["optimizer.state_dtype=int8"], "rest=adam8bit adds nothing"),
        (RestRule.foam, ["optimizer=scale"], "optimizer=scale leaves none"),
        (RestRule.lion, ["optimizer.block_parameters=[embed, lm_head, proj]"], "leaves none that is trained"),
    ],
)
def test_a_rule_without_effect_is_refused(rule: RestRule, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(rule, *more)


def test_a_tied_head_is_the_embedding() -> None:
    _, optimizer = built(RestRule.scale, "model.tie_word_embeddings=true")
    assert list(optimizer.groups[1].parameters) == [EMBEDDING]
    assert optimizer.groups[1].state_bytes() == 0


def test_the_default_is_no_part_of_what_a_run_is() -> None:
    before = compose(COMMON)
    assert "optimizer.rest" not in identity(before)
    assert run_name(before) == run_name(compose([*COMMON, "optimizer.rest=adam"]))
    assert run_name(before) != run_name(compose([*COMMON, "optimizer.rest=foam"]))
