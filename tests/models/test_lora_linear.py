"""Linears with adapters against autograd, against their merged weights, and what they keep."""

import pytest
import torch
from helpers.variations import TINY, VARIATIONS, batch, random_model
from torch import Tensor
from torch.func import functional_call

from rsotrain.config.model import ModelConfig
from rsotrain.config.schema import ActivationCheckpointing, Precision
from rsotrain.errors import UserError
from rsotrain.instruments.memory import saved_activation_bytes
from rsotrain.models.architecture import input_groups
from rsotrain.models.llama import Llama
from rsotrain.models.lora_linear import LoraLinear, attach_adapters, factor_names, merged
from rsotrain.parallel.sharding import Shard

ALPHA, RANK = 8.0, 0.25


def adapted(model: Llama) -> dict[str, LoraLinear]:
    """Adapters with values for all linears of the blocks."""
    names = [place.name for group in input_groups(model) for place in group]
    layers = attach_adapters(model, names, RANK, ALPHA)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.normal_(0.0, 0.1, generator=random)
    return layers


def wide(config: ModelConfig) -> Llama:
    model = random_model(config).double()
    model.model.compute_dtype = torch.float64
    return model


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", VARIATIONS.values(), ids=VARIATIONS)
def test_gradients_are_those_of_autograd(config: ModelConfig) -> None:
    """Of the model whose weights are W + (α/r) B A, written as such."""
    model, plain = wide(config), wide(config)
    layers = adapted(model)
    tokens, targets = batch()
    loss = model(tokens, targets)
    loss.backward()
    given = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        A, B = factors[name] = tuple(f.detach().clone().requires_grad_() for f in layer.tensors()[1:])  # type: ignore[assignment]
        given[name] = given[name].detach() + ALPHA / A.shape[0] * B @ A
    expected = functional_call(plain, given, (tokens, targets))
    expected.backward()
    # float64 throughout, but for the statistics of norms, which both have in float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, layer in layers.items():
        assert layer.weight.grad is None
        assert relative(layer.lora_A.grad, factors[name][0].grad) < 1e-12
        assert relative(layer.lora_B.grad, factors[name][1].grad) < 1e-12
    for name, parameter in model.named_parameters():
        if name in given and name not in layers and (own := given[name].grad) is not None and own.norm() > 0:
            assert relative(parameter.grad, own) < 1e-10, name


def test_the_merged_model_is_the_model() -> None:
    model = random_model(TINY)
    layers = adapted(model)
    tokens, _ = batch()
    with torch.no_grad():
        unmerged, base = model(tokens), random_model(TINY)(tokens)
        tensors = merged(dict(model.named_parameters()), ALPHA)
        found = functional_call(random_model(TINY), tensors, (tokens,))
    assert tensors.keys() == dict(random_model(TINY).named_parameters()).keys()
    assert (unmerged - base).norm() > 0.1 * base.norm()  # the adapters do something
    assert relative(found, unmerged) < 1e-5  # float32
    # of pieces, as of ranks that share the rows or the columns
    name = next(iter(layers))
    own = {name: model.get_parameter(name).detach()} | {
        factor: model.get_parameter(factor) for factor in factor_names(name)
    }
    for dim in (0, 1):
        shard = Shard(tuple(own[name].shape), dim, 8, 16)
        piece = merged(own | {name: shard.of(own[name])}, ALPHA, {name: shard})[name]
        torch.testing.assert_close(piece, shard.of(tensors[name]))


def test_recomputing_and_mixed_groups_change_nothing() -> None:
    """Blocks that are computed again; a query with an adapter beside a key without one."""
    results = []
    for how in ActivationCheckpointing:
        model = random_model(TINY, activation_checkpointing=how)
        attach_adapters(model, ["model.layers.0.self_attn.q_proj.weight"], RANK, ALPHA)
        layer = model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
        with torch.no_grad():
            layer.lora_A.fill_(0.1)  # type: ignore[union-attr, operator]
            layer.lora_B.fill_(0.1)  # type: ignore[union-attr, operator]
        loss = model(*batch())
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_no_more_is_kept_than_without_adapters() -> None:
    kept = []
    for attach in (False, True):
        model = random_model(TINY, precision=Precision.fp32)
        if attach:
            adapted(model)
        with saved_activation_bytes(list(model.parameters())) as saved:
            model(*batch())
        kept.append(saved.total)
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("names", "rank", "sentence"),
    [
        (["lm_head.weight"], 4, "matches lm_head.weight, which can have no adapter"),
        (["model.layers.0.mlp.up_proj.weight"], 33, "rank=33 is larger"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(
    names: list[str], rank: int | float, sentence: str
) -> None:
    model = random_model(TINY)
    with pytest.raises(UserError, match=sentence):
        attach_adapters(model, names, rank, ALPHA)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
