"""Batches that are not finite, or spike, are passed over: as if the data did not have them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.methods import refreshed_every
from helpers.runs import EACH_OPTIMIZER, compose, load_data, trainer

from rsotrain.errors import NonFiniteError
from rsotrain.training.bad_steps import MIN_NORMS, WINDOW, BadSteps
from rsotrain.training.trainer import Trainer

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def with_bad_batches(
    overrides: list[str], cache_dir: Path, bad: set[int], factor: float = math.nan
) -> Trainer:
    """The loss of the batches with these numbers, counted from 0, is multiplied by ``factor``."""
    made = trainer(overrides, cache_dir)
    own: Forward = made.forward

    def forward(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = own(inputs, targets)
        return loss * factor if made.position // made.config.batch_size in bad else loss

    made.forward = forward  # type: ignore[method-assign]
    return made


def tensors(trained: Trainer) -> dict[str, torch.Tensor]:
    state = trained.state_dict()
    return {name: t.clone() for part in ("model", "optimizer") for name, t in state[part].items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_a_skipped_batch_leaves_no_trace_but_the_position(
    optimizer: str, tiny: list[str], cache_dir: Path
) -> None:
    gap = refreshed_every(optimizer, 2)
    overrides = [*tiny, f"optimizer={optimizer}", *gap, "max_bad_steps=2"]
    made = with_bad_batches(overrides, cache_dir, {1, 3})  # in the steps that a refresh follows, too
    skipped = []
    while made.step < 4:
        before = tensors(made)
        result = made.train_step()
        skipped.append(bool(result.skipped))
        if result.skipped:
            assert_equal(tensors(made), before)
            assert all(holder.grad is None for holder in made.optimizer.gradient_holders())
    assert skipped == [False, True, False, True, False, False]
    assert (made.position, made.bad_steps.count) == (6 * 4, 2)
    # the same as with data that have no such batches
    clean = trainer(overrides, cache_dir)
    for position in (0, 2, 4, 5):
        clean.position = position * 4
        assert not clean.train_step().skipped
    assert_equal(tensors(made), tensors(clean))
    assert (made.step, made.tokens) == (clean.step, clean.tokens)


def test_a_run_resumed_across_skipped_batches_is_bitwise_the_same(tiny: list[str], cache_dir: Path) -> None:
    overrides = [*tiny, "optimizer=galore", "max_bad_steps=3", "steps=24", "spike_factor=20"]
    bad = {2, 18}
    straight = with_bad_batches(overrides, cache_dir, bad, factor=1e4)
    # the norms that a spike is measured against are a part of the state: batch 2 is before there are enough
    outcomes = [straight.train_step() for _ in range(22)]
    assert [i for i, outcome in enumerate(outcomes) if outcome.skipped] == [18]
    for stop in (1, 18, 19):
        first = with_bad_batches(overrides, cache_dir, bad, factor=1e4)
        for _ in range(stop):
            first.train_step()
        saved = first.state_dict()
        copied = {part: {k: v.clone() for k, v in saved[part].items()} for part in ("model", "optimizer")}
        second = with_bad_batches(overrides, cache_dir, bad, factor=1e4)
        second.load_state_dict({**copied, "trainer": saved["trainer"]})
        assert [second.train_step() for _ in range(22 - stop)] == outcomes[stop:]
        assert_equal(tensors(second), tensors(straight))
        assert second.state_dict()["trainer"] == straight.state_dict()["trainer"]


def test_after_the_last_batch_that_may_be_skipped_training_ends(tiny: list[str], cache_dir: Path) -> None:
    made = with_bad_batches([*tiny, "max_bad_steps=2"], cache_dir, set(range(1, 9)))
    made.train_step()
    before = tensors(made)
    said = [made.train_step().skipped for _ in range(2)]
    assert said[1] == ("step 2: the loss is nan and the gradient norm nan: batch skipped (2 of at most 2)")
    with pytest.raises(
        NonFiniteError, match=r"step 2: the loss is nan .*, and max_bad_steps=2 batches have been skipped"
    ):
        made.train_step()
    assert_equal(tensors(made), before)


def test_nothing_is_remembered_where_nothing_is_to_be_skipped(tiny: list[str], cache_dir: Path) -> None:
    made = trainer(tiny, cache_dir)
    made.train_step()
    assert not {"bad_steps", "gradient_norms"} & made.state_dict()["trainer"].keys()


def test_a_spike_is_measured_against_the_median_of_the_last_updates() -> None:
    judge = BadSteps(limit=100, spike_factor=3.0)
    for i in range(MIN_NORMS - 1):
        assert judge.verdict(i, 1.0, 1000.0 if i == 3 else 1.0) == ""  # nothing is known yet of what is usual
    assert judge.verdict(0, 1.0, 1.0) == ""
    assert judge.verdict(0, 1.0, 3.0) == ""
    assert "the gradient norm is 3.001, and the median of the last 17 1" in judge.verdict(0, 1.0, 3.001)
    assert judge.count == 1
    for _ in range(WINDOW):  # a norm that rises slowly takes the median with it
        assert judge.verdict(0, 1.0, 2.9) == ""
    assert len(judge.norms) == WINDOW
    assert judge.verdict(0, 1.0, 8.0) == ""
    assert judge.verdict(0, 1.0, 9.0) != ""
    assert judge.verdict(0, math.inf, 1.0) != ""
    assert BadSteps(limit=1).verdict(0, 1.0, 1e30) == ""


@pytest.mark.parametrize(
    "damaged", [{"bad_steps": "x"}, {"gradient_norms": 3}, {"gradient_norms": ["x"]}, {"bad_steps": None}]
)
def test_a_damaged_record_is_refused_before_anything_is_loaded(
    damaged: dict[str, object], tiny: list[str], cache_dir: Path
) -> None:
    made = trainer(tiny, cache_dir)
    state = made.state_dict()
    state["trainer"] |= damaged
    with pytest.raises(TypeError, match="damaged"):
        made.load_state_dict(state)


def test_micro_batches_are_skipped_together(tiny: list[str], cache_dir: Path) -> None:
    config = compose([*tiny, "max_bad_steps=1", "micro_batch_size=1"])
    made = Trainer(config, load_data(config, cache_dir))
    own, calls = made.forward, 0

    def forward(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return own(inputs, targets) * (math.nan if calls == 2 else 1.0)

    made.forward = forward  # type: ignore[method-assign]
    assert made.train_step().skipped
    assert (calls, made.step, made.position) == (4, 0, 4)
    assert not made.train_step().skipped
    assert (made.step, made.position) == (1, 8)
