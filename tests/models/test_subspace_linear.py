"""Linears under RSO inside a LLaMA: gradients, what is kept, checkpointing, compilation, evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.runs import PRECISIONS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rsotrain.config.choices import BasisStorage, OnRefresh
from rsotrain.config.methods import RSOConfig
from rsotrain.config.samplers import HaarConfig, SamplerConfig, SvdConfig
from rsotrain.config.schema import ActivationCheckpointing, ModelConfig, Precision
from rsotrain.instruments.memory import saved_activation_bytes
from rsotrain.models.build import build_model
from rsotrain.models.functional import rotary_tables, shared_input_linear, swiglu
from rsotrain.models.layers import Linear
from rsotrain.models.llama import Llama
from rsotrain.models.subspace_linear import SubspaceLinear, subspace_linear
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer

HIDDEN, FFN, HEADS, LAYERS, VOCAB = 32, 56, 4, 2, 50
BATCH, SEQ, RANK = 2, 24, 8
HAAR = HaarConfig(name="haar")
CPU = torch.device("cpu")


def model_of(
    kv_heads: int | None = None,
    precision: Precision = Precision.fp32,
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
) -> Llama:
    sizes = ModelConfig(
        name="x", hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, initializer_range=0.1,
    )  # fmt: skip
    return build_model(
        sizes,
        vocab_size=VOCAB,
        precision=precision,
        device=CPU,
        seed=0,
        activation_checkpointing=checkpointing,
    )


def rso_for(
    model: nn.Module, sampler: SamplerConfig = HAAR, precision: Precision = Precision.fp32, **own: Any
) -> CompositeOptimizer:
    settings = {"name": "rso", "lr": 0.01, "eps": 1e-4, "rank": 0.25, "update_proj_gap": 2} | own
    config = RSOConfig(**settings)
    return build_optimizer(model, config, sampler, precision=precision, seed=0, total_steps=10)


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def step(model: nn.Module, optimizer: CompositeOptimizer, seed: int) -> float:
    with optimizer.observing():
        loss = model(*tokens(seed)) / (BATCH * SEQ)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def linears(model: nn.Module) -> dict[str, SubspaceLinear]:
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, SubspaceLinear)}


# Entries of dB and of dX are sums of products in another order: rounding of the compute dtype, relative to
# the largest entry.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_db_is_the_full_gradient_times_p(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    x, basis, grads = normal(3, 7, 12), normal(12, 4), [normal(3, 7, 10), normal(3, 7, 6)]
    weights = [normal(10, 12), normal(6, 12)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    full = [w.clone().requires_grad_() for w in weights]
    leaves = [w.new_zeros(()).expand(len(w), 4).requires_grad_() for w in weights]
    plain = shared_input_linear(inputs[0], *full)
    ours = subspace_linear(inputs[1], basis, weights, leaves)
    for p, q in zip(plain, ours, strict=True):
        assert torch.equal(p, q)
    torch.autograd.backward(plain, grads)
    torch.autograd.backward(ours, grads)
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    for weight, leaf in zip(full, leaves, strict=True):
        assert weight.grad is not None
        assert leaf.grad is not None
        expected = weight.grad.double() @ basis.double()
        error = (leaf.grad.double() - expected).abs().max()
        assert error <= ROUNDING[dtype] * expected.abs().max()
        assert leaf.grad.shape == (len(weight), 4)
        assert leaf.grad.is_contiguous()


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_every_block_linear_gets_its_projected_gradient(kv_heads: int | None) -> None:
    plain, model = model_of(kv_heads), model_of(kv_heads)
    names = [name for name, _ in model.named_parameters()]
    optimizer = rso_for(model)
    assert [name for name, _ in model.named_parameters()] == names
    plain(*tokens()).backward()
    model(*tokens()).backward()
    projected = linears(model)
    assert len(projected) == 7 * LAYERS
    for name, parameter in plain.named_parameters():
        full = parameter.grad
        assert full is not None
        if layer := projected.get(name):
            assert layer.weight.grad is None
            assert not layer.weight.requires_grad
            assert layer.B.grad is not None
            expected = full @ layer.input_group.current_basis()
            assert (layer.B.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name
        else:
            assert torch.allclose(model.get_parameter(name).grad, full, rtol=1e-5, atol=1e-6), name  # type: ignore[arg-type]
    held = {id(holder) for holder in optimizer.gradient_holders()}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} | {
        id(layer.B) for layer in projected.values()
    }
    # rank hidden/4 at every input group, those that grouped queries make narrow and down_proj too
    assert {layer.input_group.rank for layer in projected.values()} == {RANK}
    assert {layer.input_group.size for layer in projected.values()} == {HIDDEN, FFN}


def test_queries_keys_and_values_share_a_basis_and_gate_shares_ups() -> None:
    model = model_of()
    rso_for(model)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        assert attention.q_proj.input_group is attention.k_proj.input_group is attention.v_proj.input_group
        assert mlp.gate_proj.input_group is mlp.up_proj.input_group
        input_groups = {
            id(x.input_group) for x in (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
        }
        assert len(input_groups) == 4


def test_linears_that_no_pattern_names_stay_plain_and_trained() -> None:
    plain, model = model_of(), model_of()
    rso_for(model, block_parameters=[r"[qv]_proj\.weight$", r"gate_proj\.weight$"])
    attention = model.model.layers[0].self_attn
    assert type(attention.k_proj) is Linear
    assert attention.q_proj.input_group is attention.v_proj.input_group
    for one in (plain, model):
        one(*tokens()).backward()
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        grads = [m.model.layers[0].get_parameter(f"{name}.weight").grad for m in (plain, model)]
        assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    assert attention.q_proj.B.grad is not None


def test_frozen_linears_are_left_alone() -> None:
    model = model_of()
    frozen = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    optimizer = rso_for(model)
    before = frozen.clone()
    for seed in range(3):
        step(model, optimizer, seed)
    assert type(model.model.layers[0].self_attn.k_proj) is Linear
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_what_is_kept_equals_the_formula(kv_heads: int | None) -> None:
    """Per token and block: the two norms' inputs, q k v, attention's output, gate, up, and Z of o_proj."""
    kept = {}
    for method in ("rso", "plain"):
        model = model_of(kv_heads, Precision.bf16_mixed)
        if method == "rso":
            rso_for(model, precision=Precision.bf16_mixed)
        bases = [basis for x in linears(model).values() if (basis := x.input_group.basis) is not None]
        with saved_activation_bytes([*model.parameters(), *bases]) as saved:
            model(*tokens())
        kept[method] = saved.total
    count, kv = BATCH * SEQ, HIDDEN // HEADS * (kv_heads or HEADS)
    block = 2 * count * (2 * HIDDEN + (HIDDEN + 2 * kv) + HIDDEN + 2 * FFN)  # bf16
    log_sum_exp = 4 * count * HEADS  # fp32
    tables = 2 * 4 * SEQ * (HIDDEN // HEADS)
    embedding = 8 * BATCH * (SEQ + 1)  # token indices, with the targets' in one storage
    final = 2 * count * HIDDEN  # its norm's input
    head = 2 * count * HIDDEN + 4 * VOCAB * HIDDEN  # the loss' gradients
    rest = tables + embedding + final + head
    # The other linears' inputs, and under RSO their Z, are made again from what is kept anyway.
    projected = 2 * count * RANK
    assert kept["rso"] == LAYERS * (block + log_sum_exp + projected) + rest
    assert kept["plain"] == LAYERS * (block + log_sum_exp) + rest


def test_no_tensor_of_a_weights_size_is_made_in_the_backward_pass() -> None:
    """The largest allocation of a block's backward is smaller than a weight: gradients are out × r."""
    model = model_of()
    rso_for(model)
    block = model.model.layers[0]
    tables = rotary_tables(4, HIDDEN // HEADS, 1e4, CPU)
    # 4 tokens, so that activations are smaller than any weight
    out = block(torch.randn(1, 4, HIDDEN, requires_grad=True), tables)
    with torch.profiler.profile(profile_memory=True) as profile:
        out.sum().backward()
    sizes = [event.nbytes() for event in memory_events(profile)]
    assert 0 < max(sizes) < 4 * HIDDEN * HIDDEN
    plain = model_of().model.layers[0]
    out = plain(torch.randn(1, 4, HIDDEN, requires_grad=True), tables)
    with torch.profiler.profile(profile_memory=True) as profile:
        out.sum().backward()
    assert max(event.nbytes() for event in memory_events(profile)) >= 4 * FFN * HIDDEN


def memory_events(profile: torch.profiler.profile) -> list[Any]:
    result = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event for event in result if event.name() == "[memory]"]


def test_evaluation_projects_nothing_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    rso_for(model)
    training = model(*tokens()).detach()
    monkeypatch.setattr("rsotrain.models.subspace_linear.subspace_linear", None)
    with torch.no_grad():
        assert torch.equal(model(*tokens()), training)


SAMPLERS: dict[str, SamplerConfig] = {"haar": HAAR, "svd": SvdConfig(name="svd")}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("what", ["mlp", "block"])
def test_activation_checkpointing_changes_nothing_but_memory(what: str, sampler: str) -> None:
    checkpointing = ActivationCheckpointing(what)
    kept, recomputed = model_of(), model_of(checkpointing=checkpointing)
    first, second = rso_for(kept, SAMPLERS[sampler]), rso_for(recomputed, SAMPLERS[sampler])
    for seed in range(5):
        assert step(kept, first, seed) == step(recomputed, second, seed)
    for p, q in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_observed_gram_is_that_of_the_inputs_once_for_each_micro_batch() -> None:
    model = model_of(checkpointing=ActivationCheckpointing.block)
    optimizer = rso_for(model, SAMPLERS["svd"])
    inputs: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    original: Callable[..., Any] = down.product_of_swiglu
    down.product_of_swiglu = lambda *x: (inputs.append(swiglu(*x).detach()), original(*x))[1]
    seen = []
    for seed in range(2):
        with optimizer.observing():
            loss = model(*tokens(seed))
        seen.append(inputs[-1])
        loss.backward()
        with torch.no_grad(), optimizer.observing():
            model(*tokens(7))  # no part of training
    expected = sum(x.reshape(-1, FFN).double().T @ x.reshape(-1, FFN).double() for x in seen)
    gram = down.input_group.take_gram()
    assert (gram - expected).abs().max() < 1e-5 * expected.abs().max()  # fp32 sums
    assert torch.equal(gram, gram.T)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "own", "compilation"),
    [
        ("haar", {}, {}),
        # sampling is left to eager code
        ("haar", {"projection": BasisStorage.regenerated}, {"backend": "aot_eager"}),
        # transported, since singular vectors may come with another sign
        ("svd", {"on_refresh": OnRefresh.transport}, {"backend": "aot_eager"}),
    ],
    ids=["stored", "regenerated", "informed"],
)
def test_compiled_blocks_train_as_eager_ones(
    sampler: str, own: dict[str, Any], compilation: dict[str, Any]
) -> None:
    torch.compiler.reset()  # graphs of other tests count against the limit of recompilations
    eager, compiled = model_of(2), model_of(2)
    first, second = rso_for(eager, SAMPLERS[sampler], **own), rso_for(compiled, SAMPLERS[sampler], **own)
    for block in compiled.model.layers:
        block.compile(**compilation)
    for seed in range(5):
        # fused fp32 arithmetic in another order
        assert step(compiled, second, seed) == pytest.approx(step(eager, first, seed), rel=1e-4)
    with torch.no_grad():
        assert float(compiled(*tokens())) == pytest.approx(float(eager(*tokens())), rel=1e-4)


def test_compiled_blocks_share_one_graph_without_a_break() -> None:
    torch.compiler.reset()
    model = model_of()
    optimizer = rso_for(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(fullgraph=True, backend=counter)
    for seed in range(3):  # a refresh after the second
        step(model, optimizer, seed)
    assert counter.frame_count == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradient_bytes_of_block_linears_are_r_over_in_of_the_weights(precision: Precision) -> None:
    model = model_of(precision=precision)
    rso_for(model, precision=precision)
    model(*tokens()).backward()
    for layer in linears(model).values():
        assert layer.B.grad is not None
        ratio = layer.B.grad.nbytes / layer.weight.nbytes
        assert ratio == RANK / layer.weight.shape[1]
        assert layer.B.untyped_storage().nbytes() == layer.weight.element_size()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_learns_in_every_precision(sampler: str, precision: Precision) -> None:
    model = model_of(precision=precision)
    optimizer = rso_for(model, SAMPLERS[sampler], precision, lr=0.02, update_proj_gap=10)
    losses = [step(model, optimizer, 0) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
