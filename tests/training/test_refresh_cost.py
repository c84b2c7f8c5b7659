"""The word at the start of a run whose refreshes take a large share of a GPU's time."""

import pytest
from helpers.runs import compose

from rsotrain.planner.fake_run import FakeRun
from rsotrain.training.refresh_cost import costly_refreshes

TINY = ["model=llama_tiny", "tokenizer.vocab_size=300", "seq_len=16", "batch_size=4", "micro_batch_size=2"]


def said(*overrides: str, device_kind: str = "cuda") -> list[str]:
    config = compose([*TINY, *overrides])
    with FakeRun(config, "cpu") as run:
        run.trainer.config = config  # with its own batch size
        return costly_refreshes(run.trainer, device_kind)


def test_eigenvectors_of_every_matrix_are_told_with_their_cost() -> None:
    (sentence,) = said("optimizer=galore", "sampler.power_on_gpu=false")
    # 14 matrices of 64×64, each 9·64³ operations and 64 columns of 20 µs: 18 ms, beside 200 short steps
    assert sentence.startswith(
        "sampler=svd takes the eigenvectors of 14 matrices every 200 steps, about 0.018 s on a GPU,"
    )
    assert "of the time (both estimated); sampler=randomized_svd" in sentence


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adam"],
        ["optimizer=rso"],
        ["optimizer=carry"],
        ["optimizer=galore"],
        ["optimizer=galore", "sampler=randomized_svd"],
        ["optimizer=galore", "optimizer.update_proj_gap=100000000"],
    ],
)
def test_nothing_is_said_of_refreshes_that_take_next_to_nothing(overrides: list[str]) -> None:
    assert said(*overrides) == []


def test_nothing_is_said_on_a_cpu() -> None:
    assert said("optimizer=galore", "sampler.power_on_gpu=false", device_kind="cpu") == []
