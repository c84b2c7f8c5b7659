"""The whole model: counted, initialised, validated, and the same in every precision and compiled."""

import dataclasses
import time

import pytest
import torch
from helpers.command import ROOT
from helpers.variations import TINY, VOCAB, batch
from omegaconf import OmegaConf

from rsotrain.config.schema import ActivationCheckpointing, ModelConfig, Precision
from rsotrain.errors import UserError
from rsotrain.models.build import build_model, count_parameters
from rsotrain.models.llama import Llama

CPU, META = torch.device("cpu"), torch.device("meta")
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)


def build(config: ModelConfig = TINY, precision: Precision = Precision.fp32, **options: object) -> Llama:
    arguments = {"vocab_size": VOCAB, "precision": precision, "device": CPU, "seed": 0} | options
    return build_model(config, **arguments)  # type: ignore[arg-type]


COUNTS = {
    "llama_9m": 8_995_968,
    "llama_20m": 19_548_416,
    "llama_35m": 35_197_824,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_3b": 2_685_831_680,
    "llama_7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    """The published sizes, from the configuration files."""
    path = ROOT / "conf" / "model" / f"{name}.yaml"
    file = OmegaConf.load(path)
    assert OmegaConf.to_container(file.pop("defaults")) == ["/schema/model/llama@_here_"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), file))
    assert isinstance(config, ModelConfig)
    assert config.name == name
    start = time.perf_counter()
    model = build_model(config, vocab_size=32000, precision=Precision.bf16, device=META, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    assert count_parameters(config, 32000) == COUNTS[name]
    assert time.perf_counter() - start < 10.0  # nothing is allocated


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(0)
    first = build().state_dict()
    torch.manual_seed(5)
    deeper = build(dataclasses.replace(TINY, num_hidden_layers=3)).state_dict()
    for name, value in first.items():
        assert torch.equal(value, deeper[name]), name
    other_seed = build(seed=1).state_dict()
    weights = [name for name in first if "norm" not in name]
    assert all(not torch.equal(first[name], other_seed[name]) for name in weights)
    assert len({first[name].flatten()[0].item() for name in weights}) == len(weights)
    bf16 = build(precision=Precision.bf16).state_dict()
    mixed = build(precision=Precision.bf16_mixed).state_dict()
    for name, value in first.items():
        assert torch.equal(mixed[name], value)
        assert torch.equal(bf16[name], value.bfloat16())
    state = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_distribution() -> None:
    for name, parameter in build(dataclasses.replace(TINY, initializer_range=0.05)).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            # The sample deviation of n normals scatters by 1/√(2n), the mean by 1/√n: five of each.
            n = parameter.numel()
            assert abs(parameter.std().item() / 0.05 - 1) < 5 / (2 * n) ** 0.5
            assert abs(parameter.mean().item() / 0.05) < 5 / n**0.5


def test_tied_head_is_one_parameter() -> None:
    model = build(TIED)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in model.state_dict()
    assert torch.equal(model.lm_head.weight, build().model.embed_tokens.weight)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.bf16_mixed])
def test_bf16_is_near_fp32(precision: Precision) -> None:
    tokens, targets = batch()
    reference, model = build(), build(precision=precision)
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(tokens).dtype == torch.bfloat16
    loss, expected = model(tokens, targets), reference(tokens, targets)
    assert loss.dtype == torch.float32
    # Logits of size 0.1 round by 2⁻⁹ of that: far below 1e-3 of a loss of ln 97 a token.
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0.0)
    loss.backward()
    expected.backward()
    references = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        grad, exact = parameter.grad, references[name].grad
        assert grad is not None
        assert exact is not None
        assert grad.dtype == dtype
        # About ten roundings of relative size 2⁻⁹ lie between a gradient and the loss.
        assert ((grad.float() - exact).norm() / exact.norm()).item() < 0.03, name


@pytest.mark.parametrize("mode", [ActivationCheckpointing.mlp, ActivationCheckpointing.block])
def test_checkpointing_changes_memory_and_nothing_else(mode: ActivationCheckpointing) -> None:
    tokens, targets = batch()

    def step(checkpointing: ActivationCheckpointing) -> tuple[torch.Tensor, list[torch.Tensor | None], int]:
        model = build(activation_checkpointing=checkpointing)
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, targets)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()], saved

    loss, grads, saved = step(ActivationCheckpointing.none)
    other_loss, other_grads, other_saved = step(mode)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))  # type: ignore[arg-type]
    assert other_saved < saved


def test_evaluation_keeps_nothing_and_gives_the_training_loss() -> None:
    model = build()
    tokens, targets = batch()
    training = model(tokens, targets)
    with torch.no_grad():
        assert torch.equal(model(tokens, targets), training)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16_mixed])
@pytest.mark.parametrize("mode", [ActivationCheckpointing.none, ActivationCheckpointing.mlp])
def test_compiled_blocks_have_no_graph_break(precision: Precision, mode: ActivationCheckpointing) -> None:
    """Traced without a break, forward and backward; the eager backend, so nothing is generated."""
    tokens, targets = batch()
    eager, compiled = (build(precision=precision, activation_checkpointing=mode) for _ in range(2))
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    expected, loss = eager(tokens, targets), compiled(tokens, targets)
    expected.backward()
    loss.backward()
    # Decompositions may reorder fp32 sums; under bf16 a different rounding can move an activation by 2⁻⁸.
    tolerance = 1e-6 if precision is Precision.fp32 else 1e-3
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0.0)
    grads = {name: parameter.grad for name, parameter in eager.named_parameters()}
    for name, parameter in compiled.named_parameters():
        scale = grads[name].abs().max().item()  # type: ignore[union-attr]
        bound = scale * (1e-5 if precision is Precision.fp32 else 0.03)
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0.0, atol=bound, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"num_attention_heads": 32}, "even size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]


def test_empty_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary size is 0"):
        build(vocab_size=0)
