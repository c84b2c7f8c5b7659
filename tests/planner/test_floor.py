"""The least memory of a configuration, beside its planned peak."""

import pytest
from helpers.runs import compose

from rsotrain.planner.floor import floor_of
from rsotrain.planner.plan import make_plan

SMALL = ["model=llama_tiny", "seq_len=32", "tokenizer.vocab_size=300", "precision=bf16"]


@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso_pca", "lora"])
def test_no_peak_is_below_its_floor(optimizer: str) -> None:
    plan = make_plan(
        compose([*SMALL, f"optimizer={optimizer}", "batch_size=2", "micro_batch_size=1"]), gpus=False
    )
    floor = plan.floor
    assert floor.total == sum(floor.kinds.values()) <= plan.peak
    assert floor.kinds["parameters"] == plan.parameters.total
    assert floor.kinds["optimizer state"] == plan.optimizer_state.total
    assert floor.excess[1] > 0


@pytest.mark.alone  # of process groups
def test_the_floor_of_a_rank_has_one_gathered_block() -> None:
    sharded = ["parallelism=fsdp", "parallelism.world_size=2", "batch_size=2", "micro_batch_size=1"]
    plan = make_plan(compose([*SMALL, "optimizer=adam", *sharded, "seq_len=512"]), gpus=False)
    block = plan.parameters.blocks + 2 * 2 * 64  # this rank has half of two blocks; and two gains of 64
    assert plan.floor.kinds["gathered"] == block
    assert plan.floor.kinds["activations"] == plan.saved_activations


def test_the_larger_moment_counts_and_the_largest_excess_is_named() -> None:
    phases = {
        "forward": {"parameters": 8, "optimizer state": 4, "activations": 3, "temporaries": 1, "gathered": 0},
        "optimizer step": {"parameters": 8, "optimizer state": 4, "gradients": 6, "temporaries": 2},
    }
    whole = {
        name: {"gradients": 0, "activations": 0, "gathered": 0} | kinds | {"peak": sum(kinds.values())}
        for name, kinds in phases.items()
    }
    floor = floor_of(
        parameters=8,
        gradients=6,
        optimizer_state=4,
        saved_activations=3,
        gathered_block=0,
        phases=whole,
    )
    assert floor.total == 18
    assert floor.kinds == {"parameters": 8, "optimizer state": 4, "gradients": 6}
    assert floor.excess == ("temporaries", 2)
