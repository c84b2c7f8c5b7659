"""The training loop against its promises: one clock, accumulation, clipping, evaluation, exact resume."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.methods import ORTHOGONALISED_IN_BFLOAT16, refreshed_every
from helpers.runs import EACH_OPTIMIZER, compose, trainer

from rsotrain.data.targets import IGNORE_INDEX, valid_positions
from rsotrain.errors import NonFiniteError, UserError
from rsotrain.optim.rso import RSO
from rsotrain.training.composition import check_composition
from rsotrain.training.trainer import Trainer


def weights(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.model.named_parameters()}


def test_a_rank_is_refused_where_a_matrix_that_it_is_for_is_smaller() -> None:
    narrow = ["model=llama_tiny", "model.num_key_value_heads=1", "optimizer.rank=32"]  # k and v: 16 x 64
    check_composition(compose([*narrow, "optimizer=rso"]))  # q, k and v share a basis: of rank 64 at most
    check_composition(compose([*narrow, "optimizer=galore", "optimizer.block_parameters=[q_proj]"]))
    with pytest.raises(UserError, match=r"rank=32 is larger than the projected dimension \(16\) of .*k_proj"):
        check_composition(compose([*narrow, "optimizer=galore"]))


def test_padding_plays_no_part_in_the_bases(tiny: list[str], cache_dir: Path) -> None:
    own = ["data.packing=padded", "seq_len=256", "optimizer=rso", "sampler=svd"]
    found = []
    for padding in (0, 7):
        trained = trainer([*tiny, *own], cache_dir)
        inputs, targets = trained.data.train.batch(np.arange(4))
        padded = targets.flip(1).ne(IGNORE_INDEX).cumsum(1).flip(1) == 0
        assert 0 < padded.sum() < padded.numel()
        trained.forward(inputs.where(~padded, padding), targets)
        rso = trained.optimizer.groups[0]
        assert isinstance(rso, RSO)
        found.append([group.take_gram() for group in rso.input_groups])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_positions_are_valid_up_to_the_last_target() -> None:
    ignored = IGNORE_INDEX
    targets = torch.tensor([[ignored, 5, ignored, 6], [ignored, 5, ignored, ignored], [ignored] * 4])
    valid_mask = valid_positions(targets)
    assert valid_mask is not None
    assert valid_mask.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]
    assert valid_positions(targets[:1]) is None


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_micro_batches_give_the_update_of_one_batch(optimizer: str, tiny: list[str], cache_dir: Path) -> None:
    # eps is raised since Adam's first steps are sign(g): a gradient entry that is zero but for rounding
    # would be amplified to a full step. What is left is fp32 rounding through three updates, relative to
    # how far the weights moved. A basis amplifies it by the reciprocal of the gaps in the spectrum; SOAP,
    # which scales up the directions with the smallest gaps, amplifies it most. Muon and orbit
    # orthogonalise in bf16: 3 significant digits, and CPUs differ in how they sum such products. 1e-2
    # and, for these, 1e-1, where a wrong normalisation by the number of micro-batches would show as 3.
    # Outside principal components carry takes the signs of residuals, which rounding turns where they are
    # near zero; outside coordinates they are those of the gradient, as frugal's.
    rough = optimizer in (*ORTHOGONALISED_IN_BFLOAT16, "orbit", "orbit8bit", "soap")
    bound = 1e-1 if rough else 1e-2
    own = ["sampler=coordinate"] if optimizer == "carry" else []
    shared = [*tiny, f"optimizer={optimizer}", *own, "optimizer.eps=1e-4", "grad_clip=0.5"]
    start = weights(trainer(shared, cache_dir))
    whole, parts = trainer(shared, cache_dir), trainer([*shared, "micro_batch_size=1"], cache_dir)
    for _ in range(3):
        a, b = whole.train_step(), parts.train_step()
        assert a.loss == pytest.approx(b.loss, rel=1e-4 if rough else 1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3 if rough else 1e-4)
        assert a.tokens == b.tokens == 4 * 32
    for name, weight in weights(whole).items():
        difference, moved = weights(parts)[name] - weight, weight - start[name]
        assert moved.norm() > 0 or name in whole.optimizer.parameter_groups.frozen, name
        assert difference.norm() <= bound * moved.norm(), name
    assert whole.step == parts.step == 3


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "bf16", "bf16_mixed"])
@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    optimizer: str, precision: str, tiny: list[str], cache_dir: Path
) -> None:
    gap = refreshed_every(optimizer, 2)
    overrides = [*tiny, f"optimizer={optimizer}", f"precision={precision}", *gap]
    straight = trainer(overrides, cache_dir)
    losses = [straight.train_step().loss for _ in range(6)]
    first = trainer(overrides, cache_dir)
    for _ in range(3):
        first.train_step()
    saved = first.state_dict()
    copied = {part: {k: v.clone() for k, v in saved[part].items()} for part in ("model", "optimizer")}
    second = trainer([*overrides, "seed=0"], cache_dir)
    second.load_state_dict({**copied, "trainer": saved["trainer"]})
    assert [second.train_step().loss for _ in range(3)] == losses[3:]
    for name, weight in weights(straight).items():
        assert torch.equal(weights(second)[name], weight), name
    for name, value in straight.optimizer.state_dict().items():
        assert torch.equal(second.optimizer.state_dict()[name], value), name


def test_clipping_bounds_the_global_norm_of_the_accumulated_gradient(
    tiny: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped = trainer([*tiny, "grad_clip=0.01", "micro_batch_size=2"], cache_dir)
    seen: list[float] = []

    def step() -> None:
        norms = [gradient.norm() for gradient in clipped.optimizer.gradients()]
        seen.append(torch.stack(norms).norm().item())

    monkeypatch.setattr(clipped.optimizer, "step", step)
    result = clipped.train_step()
    assert result.grad_norm > 0.01  # what is reported is the norm before clipping
    assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_clipping_leaves_a_small_gradient_alone(tiny: list[str], cache_dir: Path) -> None:
    clipped, free = trainer([*tiny, "grad_clip=1000"], cache_dir), trainer(tiny, cache_dir)
    assert clipped.train_step() == free.train_step()
    assert all(torch.equal(weights(clipped)[name], w) for name, w in weights(free).items())


def test_the_rate_that_is_logged_is_the_rate_that_is_applied(tiny: list[str], cache_dir: Path) -> None:
    plain = [
        *tiny,
        "optimizer=adam",
        "lr_scheduler.warmup_steps=3",
        "optimizer.lr=0.25",
        "optimizer.scale=0.5",
    ]
    measured = trainer(plain, cache_dir)
    for expected in (0.25 / 3, 0.5 / 3, 0.25):
        lr, before = measured.lr, weights(measured)
        assert lr == pytest.approx(expected)
        measured.train_step()
        # Adam's steps are at most about the rate, and reach it where the gradient keeps its sign.
        moved = {name: (w - before[name]).abs().max().item() for name, w in weights(measured).items()}
        assert moved["lm_head.weight"] == pytest.approx(lr, rel=0.1)
        assert moved["model.layers.0.mlp.up_proj.weight"] == pytest.approx(lr / 2, rel=0.1)


def test_model_flops_count_each_product_once(tiny: list[str], cache_dir: Path) -> None:
    measured = trainer(tiny, cache_dir)
    linears = sum(p.numel() for n, p in measured.model.named_parameters() if n.endswith("_proj.weight"))
    head = 300 * 64
    attention = 2 * 6 * 32 * 64  # layers x causal scores and values, forward and backward
    assert measured.flops_per_token == 6 * (linears + head) + attention


def test_bits_per_byte_of_a_part_counts_the_bytes_of_that_part(tiny: list[str], cache_dir: Path) -> None:
    part = trainer([*tiny, "evaluation.max_tokens=96"], cache_dir)
    metrics, data = part.evaluate(), part.data
    text = data.tokenizer.decode(data.validation.tokens[:97].tolist())
    bits = metrics["val/loss"] * 96 / math.log(2)
    assert metrics["val/bits_per_byte"] == pytest.approx(bits / len(text.encode()))


def test_a_checkpoint_of_another_shape_is_refused_and_changes_nothing(
    tiny: list[str], cache_dir: Path
) -> None:
    small, wide = trainer(tiny, cache_dir), trainer([*tiny, "model.intermediate_size=96"], cache_dir)
    before = weights(wide)
    with pytest.raises(
        UserError,
        match=r"another model: model\.layers\.0\.mlp\.down_proj\.weight is 64x176 in float32 there"
        r" and 64x96 in float32 in this model",
    ):
        wide.load_state_dict(small.state_dict())
    assert all(torch.equal(weights(wide)[name], w) for name, w in before.items())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("precision=bf16", "lm_head.weight is 300x64 in float32 there and 300x64 in bfloat16 in this model"),
        ("model.qk_norm=true", "there is no model.layers.0.self_attn.k_norm.weight, which this model has"),
        ("model.num_hidden_layers=1", "layers.1.input_layernorm.weight (64 in float32), which this"),
        ("model.tie_word_embeddings=true", "lm_head.weight (300x64 in float32), which this model lacks"),
    ],
)  # fmt: skip
def test_what_another_model_lacks_or_has_in_another_dtype_is_named(
    override: str, sentence: str, tiny: list[str], cache_dir: Path
) -> None:
    saved, other = trainer(tiny, cache_dir).state_dict(), trainer([*tiny, override], cache_dir)
    with pytest.raises(UserError, match=re.escape(sentence)):
        other.load_state_dict(saved)
    if override == "precision=bf16":
        other.load_weights(saved["model"])  # for a new run any dtype will do


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(
    where: str, tiny: list[str], cache_dir: Path
) -> None:
    broken = trainer(tiny, cache_dir)
    norm = broken.model.model.norm.weight
    if where == "weight":
        norm.data[0] = math.nan
    else:
        norm.register_hook(lambda gradient: gradient * math.inf)
    before = weights(broken)
    with pytest.raises(NonFiniteError, match="step 1: the loss is"):
        broken.train_step()
    for name, weight in weights(broken).items():
        assert torch.equal(weight, before[name]) or weight.isnan().any()
    assert (broken.step, broken.tokens) == (0, 0)
    assert all(v.isfinite().all() for v in broken.optimizer.state_dict().values())


def test_evaluation_is_the_same_for_every_batch_size(tiny: list[str], cache_dir: Path) -> None:
    results = [
        trainer([*tiny, f"evaluation.micro_batch_size={size}"], cache_dir).evaluate() for size in (1, 3, 16)
    ]
    # Sums in float64 of fp32 losses; a matrix product may round differently for another batch size.
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-6)
    assert results[0]["val/perplexity"] == pytest.approx(math.exp(results[0]["val/loss"]))
    assert results[0]["val/loss"] == pytest.approx(math.log(300), rel=0.05)  # untrained: near uniform


def test_bits_per_byte_counts_the_bytes_of_the_documents(tiny: list[str], cache_dir: Path) -> None:
    measured = trainer(tiny, cache_dir)
    metrics, validation = measured.evaluate(), measured.data.validation
    bits = metrics["val/loss"] * (validation.num_tokens - 1) / math.log(2)  # the first is given
    assert metrics["val/bits_per_byte"] == pytest.approx(bits / validation.num_bytes)


def test_batches_are_a_function_of_seed_and_step_alone(tiny: list[str], cache_dir: Path) -> None:
    one, other = trainer(tiny, cache_dir), trainer([*tiny, "seed=1"], cache_dir)
    split = trainer([*tiny, "micro_batch_size=2"], cache_dir)
    for step in (0, 5, 3):
        one.step = other.step = split.step = step
        ((inputs, _),) = one.micro_batches()
        assert torch.equal(torch.cat([i for i, _ in split.micro_batches()]), inputs)
        assert not torch.equal(other.micro_batches()[0][0], inputs)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "galore"])
def test_compile_trains_as_eager_does(optimizer: str, tiny: list[str], cache_dir: Path) -> None:
    shared = [*tiny, f"optimizer={optimizer}", "optimizer.eps=1e-4"]
    eager, compiled = trainer(shared, cache_dir), trainer([*shared, "compile=true"], cache_dir)
    for _ in range(3):
        # The compiler fuses and reorders fp32 arithmetic: equal to rounding, not bitwise.
        assert compiled.train_step().loss == pytest.approx(eager.train_step().loss, rel=1e-4)
    assert set(weights(compiled)) == set(weights(eager))
    assert compiled.evaluate()["val/loss"] == pytest.approx(eager.evaluate()["val/loss"], rel=1e-4)


@pytest.mark.parametrize("what", ["mlp", "block"])
def test_activation_checkpointing_changes_nothing_but_memory(
    what: str, tiny: list[str], cache_dir: Path
) -> None:
    kept = trainer(tiny, cache_dir)
    recomputed = trainer([*tiny, f"activation_checkpointing={what}"], cache_dir)
    for _ in range(2):
        assert kept.train_step() == recomputed.train_step()
    memory = "memory/saved_activations_bytes"
    assert recomputed.memory()[memory] < kept.memory()[memory]


def test_memory_is_what_the_tensors_take(tiny: list[str], cache_dir: Path) -> None:
    measured = trainer([*tiny, "optimizer=adam"], cache_dir)
    measured.train_step()
    elements = sum(p.numel() for p in measured.model.parameters())
    memory = measured.memory()
    assert memory["memory/parameters_bytes"] == memory["memory/gradients_bytes"] == 4 * elements
    state = {k: v for k, v in measured.optimizer.state_dict().items() if k != "step"}
    assert memory["memory/optimizer_state_bytes"] == sum(v.numel() * v.element_size() for v in state.values())
    assert memory["memory/optimizer_state_bytes"] == 8 * elements


def test_the_whole_vocabulary_of_the_tokenizer_must_fit(tiny: list[str], cache_dir: Path) -> None:
    assert trainer([*tiny, "model.vocab_size=320"], cache_dir).train_step().loss == pytest.approx(
        math.log(320), rel=0.05
    )


@pytest.mark.parametrize("in_backward", ["false", "true"])
def test_copies_are_let_end_before_weights_change(in_backward: str, tiny: list[str], cache_dir: Path) -> None:
    own = ["optimizer=adam", f"optimizer.update_in_backward={in_backward}", "micro_batch_size=4"]
    here = trainer([*tiny, *own], cache_dir)
    before = [p.detach().clone() for p in here.model.parameters()]
    same: list[bool] = []

    def compare() -> None:
        same.append(all(map(torch.equal, here.model.parameters(), before)))

    here.before_update = compare
    here.train_step()
    assert same[0]
    compare()
    assert not same[-1]
