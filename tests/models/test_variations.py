"""Variations of the model: the same numbers as transformers' classes, under everything that training does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import EACH_OPTIMIZER, compose, load_data
from helpers.variations import LLAMA3, TINY, VARIATIONS, VOCAB, batch, random_model

from rsotrain.config.model import ModelConfig, RopeScalingConfig
from rsotrain.config.schema import ActivationCheckpointing, Precision
from rsotrain.errors import UserError
from rsotrain.instruments.memory import saved_activation_bytes
from rsotrain.models.build import build_model, model_without_memory
from rsotrain.models.documents import document_mask
from rsotrain.models.functional import rotary_tables
from rsotrain.models.llama import Llama
from rsotrain.models.rope import rope_scaling
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.formulas import state_bytes
from rsotrain.training.trainer import Trainer

# The class of transformers that is the same model, and the arguments of its configuration that are not ours.
THEIRS = {
    "default": "Llama", "grouped": "Llama", "tied": "Llama", "head_dim": "Llama",
    "heads that do not divide": "Mistral", "qkv_bias": "Qwen2", "attention_bias": "Llama",
    "mlp_bias": "Llama", "all biases": "Llama", "qk_norm": "Qwen3", "qk_norm and biases": "Qwen3",
    "rope linear": "Llama", "rope llama3": "Llama", "qkv_bias and llama3": "Qwen2",
}  # fmt: skip


def theirs_of(name: str, ours: Llama) -> Any:
    """Their model with the weights of ours, in float32."""
    transformers = pytest.importorskip("transformers")
    config, family = VARIATIONS[name], THEIRS[name]
    rope = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v is not None}
    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings, "attn_implementation": "sdpa",
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }  # fmt: skip
    if family == "Mistral":
        fields["sliding_window"] = None
    if family in ("Llama", "Qwen3"):
        fields["attention_bias"] = config.attention_bias
    if family == "Llama":
        fields["mlp_bias"] = config.mlp_bias
    if family in ("Mistral", "Llama", "Qwen3"):
        fields["head_dim"] = config.head_size
    own = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(own)
    assert list(model.state_dict()) == list(ours.state_dict())
    model.load_state_dict(ours.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("name", THEIRS)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str, masked: bool) -> None:
    """State dicts interchange; logits, loss and every gradient agree to 1e-5 in fp32."""
    tokens, targets = batch()
    separator = int(tokens[0, 9]) if masked else None
    ours = random_model(VARIATIONS[name], separator_id=separator)
    theirs = theirs_of(name, ours)
    mask = None if separator is None else document_mask(tokens, separator)
    assert mask is None or not mask[:, :, -1].all()
    theirs_logits = theirs(input_ids=tokens, use_cache=False, attention_mask=mask).logits
    torch.testing.assert_close(ours(tokens), theirs_logits, rtol=1e-5, atol=1e-5)
    loss = ours(tokens, targets)
    expected = F.cross_entropy(theirs_logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    num_valid = (targets != -100).sum()
    (loss / num_valid).backward()
    (expected / num_valid).backward()
    expected_grads = {n: parameter.grad for n, parameter in theirs.named_parameters()}
    for n, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[n], rtol=1e-5, atol=1e-5, msg=n)


@pytest.mark.parametrize("name", VARIATIONS)
@pytest.mark.parametrize("mode", [ActivationCheckpointing.mlp, ActivationCheckpointing.block])
def test_checkpointing_changes_nothing(name: str, mode: ActivationCheckpointing) -> None:
    losses, grads = [], []
    for checkpointing in (ActivationCheckpointing.none, mode):
        model = random_model(VARIATIONS[name], activation_checkpointing=checkpointing)
        loss = model(*batch())
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16_mixed])
@pytest.mark.parametrize("name", ["all biases", "qk_norm and biases", "qkv_bias and llama3"])
def test_compiled_blocks_have_no_graph_break(name: str, precision: Precision) -> None:
    """Traced without a break, forward and backward; the eager backend, so nothing is generated."""
    torch.compiler.reset()
    eager, compiled = (random_model(VARIATIONS[name], precision) for _ in range(2))
    for block in compiled.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    expected, loss = eager(*batch()), compiled(*batch())
    expected.backward()
    loss.backward()
    # as in test_llama: other sums in fp32, other roundings of activations under bf16
    full = precision is Precision.fp32
    torch.testing.assert_close(loss, expected, rtol=1e-6 if full else 1e-3, atol=0.0)
    grads = {n: p.grad for n, p in eager.named_parameters()}
    for n, parameter in compiled.named_parameters():
        bound = grads[n].abs().max().item() * (1e-5 if full else 0.03)  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, grads[n], rtol=0.0, atol=bound, msg=n)


@pytest.mark.parametrize("name", VARIATIONS)
def test_bf16_gradients_are_near_those_of_fp32(name: str) -> None:
    reference, model = random_model(VARIATIONS[name]), random_model(VARIATIONS[name], Precision.bf16_mixed)
    reference(*batch()).backward()
    model(*batch()).backward()
    exact = {n: p.grad for n, p in reference.named_parameters()}
    for n, parameter in model.named_parameters():
        grad, right = parameter.grad, exact[n]
        assert grad is not None
        assert right is not None
        assert grad.dtype == torch.float32
        # a dozen roundings of 2⁻⁹ lie between a gradient and the loss, at weights ten times the usual size;
        # keys' biases add the same to every score of a query, so that their gradient is rounding alone
        if "k_proj.bias" not in n:
            assert ((grad - right).norm() / right.norm()).item() < 0.1, n


def test_new_biases_are_0_and_gains_1_and_do_not_move_other_weights() -> None:
    plain = build_model(
        TINY, vocab_size=VOCAB, precision=Precision.fp32, device=torch.device("cpu"), seed=0
    ).state_dict()
    varied = build_model(
        dataclasses.replace(TINY, attention_bias=True, mlp_bias=True, qk_norm=True),
        vocab_size=VOCAB, precision=Precision.fp32, device=torch.device("cpu"), seed=0,
    ).state_dict()  # fmt: skip
    new = varied.keys() - plain.keys()
    assert len(new) == 2 * (7 + 2)
    for name, value in varied.items():
        expected = plain[name] if name in plain else torch.full_like(value, float("norm" in name))
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("optimizer", ["adam", "rso"])
def test_biases_keep_nothing_for_the_backward_pass(optimizer: str) -> None:
    config = compose([f"optimizer={optimizer}", "precision=bf16_mixed"])
    kept = []
    for changes in ({}, {"attention_bias": True, "mlp_bias": True}):
        model = random_model(dataclasses.replace(TINY, **changes), Precision.bf16_mixed)
        built = build_optimizer(
            model, config.optimizer, config.sampler, precision=config.precision, seed=0, total_steps=1
        )
        with saved_activation_bytes([*model.parameters(), *built.state_tensors()]) as saved:
            model(*batch())
        kept.append(saved.total)
    assert kept[0] == kept[1]


# --- rotary scaling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize(
    "scaling",
    [RopeScalingConfig("linear", 2.5), LLAMA3, RopeScalingConfig("llama3", 32.0, 1.0, 4.0, 8192)],
    ids=["linear", "llama3", "llama-3.2"],
)
def test_scaled_frequencies_are_bitwise_those_of_transformers(
    scaling: RopeScalingConfig, head_dim: int
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters=rope | {"rope_theta": 500000.0},
    )  # fmt: skip
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](config, torch.device("cpu"))
    assert attention_factor == 1.0
    ours = dataclasses.replace(TINY, rope_scaling=scaling)
    seen: list[torch.Tensor] = []

    def noted(frequencies: torch.Tensor) -> torch.Tensor:
        seen.append(rope_scaling(ours)(frequencies))
        return seen[-1]

    rotary_tables(4, head_dim, 500000.0, torch.device("cpu"), noted)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 7}, r"model\.head_dim=7 must be even"),
        ({"head_dim": 0}, r"model\.head_dim=0 must be positive"),
        ({"attention_bias": True, "qkv_bias": True}, "leave one of them out"),
        ({"block": "prenorm"}, r"model\.block=prenorm does not exist; did you mean pre_norm"),
        ({"attention": "full"}, r"model\.attention=full does not exist \(there are: causal"),
        ({"mlp": "moe"}, r"model\.mlp=moe does not exist \(there are: swiglu"),
        ({"rope_scaling": RopeScalingConfig("yarn", 2.0)}, "rope_type=yarn does not exist"),
        ({"rope_scaling": RopeScalingConfig("linear")}, r"needs a value of model\.rope_scaling\.factor"),
        ({"rope_scaling": RopeScalingConfig("linear", -1.0)}, r"factor=-1\.0 must be positive"),
        ({"rope_scaling": RopeScalingConfig("default", 2.0)}, r"factor=2\.0 has no effect"),
        (
            {"rope_scaling": RopeScalingConfig("linear", 2.0, original_max_position_embeddings=8)},
            "original_max_position_embeddings=8 has no effect",
        ),
        (
            {"rope_scaling": RopeScalingConfig("llama3", 8.0, 4.0, 1.0, 8)},
            r"low_freq_factor=4\.0 must be less",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    config: ModelConfig = dataclasses.replace(TINY, **changes)
    with pytest.raises(UserError, match=sentence) as caught:
        build_model(config, vocab_size=VOCAB, precision=Precision.fp32, device=torch.device("meta"), seed=0)
    assert "\n" not in str(caught.value)


# --- training ------------------------------------------------------------------------------------------

VARIED = ["model.attention_bias=true", "model.mlp_bias=true", "model.qk_norm=true", "model.head_dim=12"]


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_every_optimizer_trains_biases_and_gains(optimizer: str, tiny: list[str], cache_dir: Path) -> None:
    """They have the gradients that they have under adam, and move; the first steps of all are adam's own."""
    gradients, moves = [], []
    for name in ("adam", optimizer):
        config = compose([*tiny, *VARIED, f"optimizer={name}", "optimizer.lr=0.01"])
        trainer = Trainer(config, load_data(config, cache_dir))
        trained = {n: p for n, p in trainer.model.named_parameters() if p.ndim == 1}
        assert len(trained) == 2 * (7 + 2 + 2) + 1
        for inputs, targets in trainer.micro_batches():
            trainer.forward(inputs, targets).backward()
        gradients.append({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})
        trainer.optimizer.zero_grad()
        before = {n: p.detach().clone() for n, p in trained.items()}
        trainer.train_step()
        moves.append({n: (p - before[n]).detach() for n, p in trained.items()})
    for n in gradients[0]:
        torch.testing.assert_close(gradients[1][n], gradients[0][n], rtol=1e-5, atol=1e-6, msg=n)
        assert moves[1][n].abs().max() > 0, n
    assert gradients[0].keys() == gradients[1].keys() == moves[0].keys()


@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso"])
def test_the_formula_of_the_optimizer_state_knows_variations(optimizer: str) -> None:
    config = compose(["model=llama_tiny", *VARIED, "precision=fp32", f"optimizer={optimizer}"])
    built = build_optimizer(
        model_without_memory(config.model, VOCAB), config.optimizer, config.sampler,
        precision=config.precision, seed=0, total_steps=10,
    )  # fmt: skip
    assert state_bytes(config, VOCAB).total == built.state_bytes()
