"""Updates within the backward pass: the same bits as after it, without the gradients' memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.methods import refreshed_every
from helpers.runs import EACH_OPTIMIZER, OPTIMIZERS, compose, load_data, trainer

from rsotrain.config.identity import identity
from rsotrain.config.validation import validate
from rsotrain.errors import NonFiniteError, UserError
from rsotrain.training.trainer import Trainer

IN_BACKWARD = "optimizer.update_in_backward=true"


def settings_of(optimizer: str, tiny: list[str], *more: str) -> list[str]:
    """Refreshes in steps 1 and 3 of a method that has them."""
    return [*tiny, f"optimizer={optimizer}", *refreshed_every(optimizer, 2), *more]


def tensors(trained: Trainer) -> dict[str, torch.Tensor]:
    state = trained.state_dict()
    return {name: t.clone() for part in ("model", "optimizer") for name, t in state[part].items()}


def check_same_bits(overrides: list[str], cache_dir: Path, steps: int = 3) -> None:
    after, within = trainer(overrides, cache_dir), trainer([*overrides, IN_BACKWARD], cache_dir)
    for _ in range(steps):
        one, other = after.train_step(), within.train_step()
        assert one.loss == other.loss
        # the norms are added in the order in which gradients arrive
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)
    expected = tensors(after)
    for name, tensor in tensors(within).items():
        assert torch.equal(tensor, expected[name]), name
    mine, theirs = within.optimizer.metrics(), after.optimizer.metrics()
    assert mine.keys() == theirs.keys()
    for name in mine.keys() - {"subspace/refresh_seconds"}:
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_the_weights_are_those_of_updates_after_the_backward_pass(
    optimizer: str, tiny: list[str], cache_dir: Path
) -> None:
    more = ["precision=bf16", "optimizer.state_dtype=int8", "optimizer.weight_decay=0.1"]
    check_same_bits(settings_of(optimizer, tiny, *more), cache_dir)


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("adam", ["precision=fp32", "model.tie_word_embeddings=true"]),
        (
            "rso",
            ["precision=bf16_mixed", "activation_checkpointing=block", "optimizer.projection=regenerated"],
        ),
        ("rso_pca", ["precision=fp32", "optimizer.staggered=true", "optimizer.update_proj_gap=3"]),
        ("galore", ["precision=bf16", "optimizer.state_dtype=bfloat16", "activation_checkpointing=mlp"]),
        ("galore", ["precision=fp32", "sampler=online_pca", "model.freeze=['embed_tokens','norm']"]),
        ("rso", ["precision=bf16", "optimizer.proximal_eta=1.0", "optimizer.refresh_warmup_steps=1"]),
        ("relora", ["precision=bf16_mixed", "activation_checkpointing=block"]),
    ],
    ids=["tied", "checkpointed", "staggered", "rounded", "frozen", "proximal", "merged"],
)
def test_other_settings_change_nothing_about_that(
    optimizer: str, more: list[str], tiny: list[str], cache_dir: Path
) -> None:
    check_same_bits(settings_of(optimizer, tiny, *more), cache_dir)


@pytest.mark.long
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_in_every_precision(
    optimizer: str, precision: str, state: str, tiny: list[str], cache_dir: Path
) -> None:
    more = [f"precision={precision}", f"optimizer.state_dtype={state}"]
    check_same_bits(settings_of(optimizer, tiny, *more), cache_dir)


def test_a_run_goes_on_with_either(tiny: list[str], cache_dir: Path) -> None:
    own = settings_of("rso_pca", tiny, "precision=bf16", "optimizer.state_dtype=int8")
    straight = trainer(own, cache_dir)
    first, second, third = (trainer([*own, *more], cache_dir) for more in ([IN_BACKWARD], [], [IN_BACKWARD]))
    assert identity(first.config) == identity(second.config)
    for _ in range(6):
        straight.train_step()
    for before, now in ((None, first), (first, second), (second, third)):
        if before is not None:
            now.load_state_dict(before.state_dict())
        for _ in range(2):
            now.train_step()
    expected = tensors(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(third).items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["micro_batch_size=2"],
            r"micro_batch_size=2 adds .* batch_size=4; leave it out, or make them equal",
        ),
        (["grad_clip=1.0"], r"grad_clip=1\.0 needs the norm of all gradients first; leave one of them out"),
        (["max_bad_steps=3"], r"max_bad_steps=3 judges a batch by the norm .*; leave one of them out"),
        (["parallelism=fsdp", "mode=plan", "parallelism.world_size=2"], r"parallelism=fsdp adds .*=single"),
    ],
)
def test_what_needs_whole_gradients_is_refused(more: list[str], said: str, tiny: list[str]) -> None:
    with pytest.raises(UserError, match=said):
        validate(compose([*tiny, IN_BACKWARD, *more]))


def test_one_micro_batch_by_name_is_one(tiny: list[str]) -> None:
    validate(compose([*tiny, IN_BACKWARD, "micro_batch_size=4"]))


def test_a_bad_batch_is_told_after_its_update(tiny: list[str], cache_dir: Path) -> None:
    made = trainer([*tiny, IN_BACKWARD], cache_dir)
    own = made.forward

    def forward(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return own(inputs, targets) * math.nan

    made.train_step()
    made.forward = forward  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"step 2: .*: stopped after the update"):
        made.train_step()
    assert made.step == 1


def test_a_parameter_without_a_gradient_is_named(tiny: list[str], cache_dir: Path) -> None:
    made = trainer([*tiny, IN_BACKWARD], cache_dir)
    head = made.model.lm_head.weight
    made.forward = lambda inputs, targets: made.model.model.embed_tokens.weight.sum()  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="has no gradient: it took no part in the loss"):
        made.train_step()
    assert head.grad is None


def test_a_backward_pass_outside_a_step_keeps_its_gradients(tiny: list[str], cache_dir: Path) -> None:
    made = trainer([*tiny, IN_BACKWARD], cache_dir)
    before = tensors(made)
    ((inputs, targets),) = made.micro_batches()
    made.forward(inputs, targets).backward()
    assert made.model.lm_head.weight.grad is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(made).items())


def most_allocated(step: Callable[[], Any]) -> int:
    """Most bytes of torch's CPU allocator that are alive at a time within ``step``, above those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    peak = alive = 0
    for nbytes in sizes:
        alive += nbytes
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso"])
def test_gradients_are_not_there_at_a_time(optimizer: str, tiny: list[str], cache_dir: Path) -> None:
    own = [*tiny, "model=llama_9m", f"optimizer={optimizer}", "seq_len=8", "batch_size=1"]
    data = load_data(compose(own), cache_dir)
    peaks, gradients = [], []
    for more in ([], [IN_BACKWARD]):
        made = Trainer(compose([*own, *more]), data)
        made.train_step()
        peaks.append(most_allocated(made.train_step))
        gradients.append(made.memory()["memory/gradients_bytes"])
    assert gradients[1] < gradients[0] / 5
    # with so few tokens nearly all that a step allocates is gradients, and the update's pieces
    assert peaks[0] - peaks[1] > 0.6 * (gradients[0] - gradients[1])
