"""What is read from a model's modules: its weights, its inputs, its size and FLOPs, checked from outside."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.command import ROOT
from helpers.runs import compose
from helpers.variations import TINY, VARIATIONS, VOCAB, batch, random_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rsotrain.config.schema import ModelConfig
from rsotrain.models.architecture import Kind, Weight, count_elements, flops_per_token, weights_of
from rsotrain.models.build import count_parameters, model_without_memory
from rsotrain.models.subspace_linear import InputGroup, attach_subspace

FILES = sorted(p.stem for p in (ROOT / "conf/model").glob("*.yaml") if p.stem != "pretrained")


def config_of(name: str) -> ModelConfig:
    return VARIATIONS[name] if name in VARIATIONS else compose([f"model={name}", "optimizer=adam"]).model


@pytest.mark.parametrize("name", [*FILES, *VARIATIONS])
def test_every_parameter_is_described_once_with_its_kind_and_its_input(name: str) -> None:
    config = config_of(name)
    model = model_without_memory(config, VOCAB)
    weights = weights_of(model)
    assert [(w.name, w.shape) for w in weights] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert sum(torch.Size(w.shape).numel() for w in weights) == count_parameters(config, VOCAB)
    assert {w.input_group for w in weights} <= {w.name for w in weights} | {""}
    for w in weights:
        in_a_layer = w.name.startswith("model.layers.")
        if w.kind is Kind.linear and in_a_layer:
            assert w.input_group, f"no `shared_inputs` names {w.name}, so that optimizer=rso cannot train it"
        else:
            assert w.input_group == ""
        assert (w.kind is Kind.embedding) == ("embed" in w.name)
        assert (w.kind is Kind.bias) == w.name.endswith(".bias")
        assert (w.kind is Kind.gain) == ("norm" in w.name)
        assert (w.kind in (Kind.gain, Kind.bias)) == (len(w.shape) == 1)


@pytest.mark.parametrize("name", VARIATIONS)
def test_linears_of_one_input_group_read_one_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each input is looked at once: linears that are called apart would each bring theirs."""
    observed: Counter[str] = Counter()

    def observe(group: InputGroup, x: Tensor) -> None:
        observed[group.name] += 1
        assert x.shape[-1] == group.size

    monkeypatch.setattr(InputGroup, "observe", observe)
    model = random_model(VARIATIONS[name])
    linears = {w.name: w.input_group for w in weights_of(model) if w.input_group}
    for group in attach_subspace(model, linears, 2):
        group.basis = torch.zeros(group.size, group.rank)
        group.observing = True
    model(*batch())
    assert observed == dict.fromkeys(linears.values(), 1)


def addmm_flops(total: Any, left: torch.Size, right: torch.Size, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("name", VARIATIONS)
def test_flops_are_those_of_the_products_that_run(name: str) -> None:
    """Counted by torch in a real forward and backward pass; attention is causal, so half of it counts."""
    model = random_model(VARIATIONS[name])
    tokens, targets = batch()
    in_place = {torch.ops.aten.addmm_: addmm_flops}  # which torch counts only where it makes a new tensor
    with (
        FlopCounterMode(display=False, custom_mapping=in_place) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(tokens, targets).backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))  # scores and values
    products = sum(counts.values()) - attention
    assert attention > 0
    assert flops_per_token(model, tokens.shape[1]) * tokens.numel() == products + attention // 2


def test_flops_of_llama_7b_are_the_published_formula() -> None:
    """6 N of its matrices without the embedding, and 6·s·d a layer for causal attention."""
    config = config_of("llama_7b")
    model = model_without_memory(config, 32000)
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert flops_per_token(model, 2048) == 6 * matrices + 32 * 6 * 2048 * 4096
    tied = model_without_memory(dataclasses.replace(config, tie_word_embeddings=True), 32000)
    assert flops_per_token(tied, 2048) == flops_per_token(model, 2048)  # its product runs all the same
    assert count_elements(tied) == count_elements(model) - 32000 * 4096


def test_a_module_that_does_not_say_what_its_parameters_are_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

    with pytest.raises(AssertionError, match="Scale does not say in `kinds` what its factor is"):
        weights_of(nn.Sequential(Scale()))


def test_what_is_read_does_not_depend_on_how_the_linears_are_trained() -> None:
    model = random_model(TINY)
    before: list[Weight] = weights_of(model)
    measure: Callable[[], int] = lambda: flops_per_token(model, 8)  # noqa: E731
    flops = measure()
    attach_subspace(model, [w.name for w in before if w.input_group], 2)
    assert weights_of(model) == before
    assert measure() == flops
