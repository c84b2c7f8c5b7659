"""Which parameters weight decay acts on: matrices alone, or all of them."""

from dataclasses import replace

import pytest
import torch
from helpers.methods import small
from helpers.runs import OPTIMIZERS, compose

from rsotrain.config.schema import Precision
from rsotrain.models.build import build_model
from rsotrain.models.llama import Llama
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer

VOCAB, DECAY, LR = 64, 0.5, 0.01
UNDECAYED = ("embed_tokens", "lm_head", "norm", "bias")
RARE = VOCAB - 1  # a token that no batch has


def built(name: str, **settings: object) -> tuple[Llama, CompositeOptimizer]:
    model_config = replace(compose(["model=llama_tiny"]).model, qkv_bias=True)
    model = build_model(
        model_config, vocab_size=VOCAB, precision=Precision.fp32, device=torch.device("cpu"), seed=0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3)  # a bias that is zero would not show its decay
    optimizer, sampler = small(name, rank=8, gap=2, lr=LR, weight_decay=DECAY, **settings)
    return model, build_optimizer(model, optimizer, sampler, seed=0, total_steps=4)


def step(model: Llama, optimizer: CompositeOptimizer, *, scale: float) -> None:
    tokens = torch.arange(2 * 16).reshape(2, 16) % (VOCAB - 1)
    with optimizer.observing():
        loss = model(tokens, tokens.roll(-1, 1))
    (loss * scale).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_gradients_only_matrices_shrink(name: str) -> None:
    model, optimizer = built(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer, scale=0.0)
    for n, parameter in model.named_parameters():
        if n in optimizer.parameter_groups.frozen or any(part in n for part in UNDECAYED):
            assert torch.equal(parameter, before[n]), n
        else:
            factor = 1 - optimizer.groups[0].peak_lr * DECAY
            torch.testing.assert_close(parameter.detach(), before[n] * factor)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_of_the_embedding_that_no_batch_has_stay_as_they_are(name: str) -> None:
    model, optimizer = built(name)
    row = model.model.embed_tokens.weight[RARE].detach().clone()
    for _ in range(3):
        step(model, optimizer, scale=1.0)
    assert torch.equal(model.model.embed_tokens.weight[RARE], row)
    assert not torch.equal(model.model.embed_tokens.weight[0], row)


def test_on_request_all_parameters_shrink() -> None:
    model, optimizer = built("adam", decay_norms_and_embeddings=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizer, scale=0.0)
    for n, parameter in model.named_parameters():
        assert (parameter.abs() < before[n].abs()).all(), n


def test_matrices_that_the_method_does_not_train_shrink_too() -> None:
    model, optimizer = built("galore", block_parameters=["q_proj.weight$"])
    other = model.model.layers[0].mlp.up_proj.weight
    before = other.detach().clone()
    step(model, optimizer, scale=0.0)
    torch.testing.assert_close(other.detach(), before * (1 - LR * DECAY))


def test_the_state_is_the_same_either_way() -> None:
    keys = [built("rso", decay_norms_and_embeddings=d)[1].state_dict().keys() for d in (False, True)]
    assert keys[0] == keys[1]
