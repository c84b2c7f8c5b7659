"""The plan against the run: bytes of the parts and saved activations, by optimizer, on one rank and two."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.runs import OPTIMIZERS, compose, load_data

from rsotrain.config.schema import Config, Strategy
from rsotrain.data.build import Data
from rsotrain.errors import UserError
from rsotrain.instruments.memory import tensors_bytes
from rsotrain.instruments.phases import Phase, phase, watching
from rsotrain.parallel.ranks import World
from rsotrain.planner.fake_run import FakeRun
from rsotrain.planner.plan import make_plan
from rsotrain.planner.tracker import Kind, MemoryTracker
from rsotrain.training.trainer import Trainer

# One of each way to keep state, activations and gradients; the slow tests have all.
FEW = ["adam", "galore", "ldadam", "rso_pca", "sn_sm"]
COMMON = ["seq_len=32", "batch_size=4", "micro_batch_size=2", "tokenizer.vocab_size=300", "device=cpu"]


def config_of(optimizer: str, model: str, tiny: list[str], *more: str) -> Config:
    files = [o for o in tiny if o.startswith("data") or o == "logger=jsonl"]
    return compose([*files, *COMMON, f"model={model}", f"optimizer={optimizer}", *more])


def live(config: Config, data: Data, world: World) -> dict[str, int]:
    """Bytes of a run after its first step."""
    trainer = Trainer(config, data, world)
    trainer.train_step()
    return trainer.memory()


def planned(config: Config, size: int) -> dict[str, int]:
    config = replace(config, parallelism=replace(config.parallelism, world_size=size))
    with FakeRun(config, "cpu") as run:
        run.step(1)
        return {
            "memory/parameters_bytes": tensors_bytes(run.trainer.model.parameters()),
            "memory/gradients_bytes": run.gradients_bytes,
            "memory/optimizer_state_bytes": run.trainer.optimizer.state_bytes(),
            "memory/saved_activations_bytes": run.saved_activations_bytes,
        }


def assert_same(plan: dict[str, int], run: dict[str, int]) -> None:
    """The parts to the byte; activations, of which 3 % are allowed, too: it is the same code."""
    assert plan == run


def check_one_rank(optimizer: str, model: str, tiny: list[str], cache_dir: Path, *more: str) -> None:
    config = config_of(optimizer, model, tiny, *more)
    found = live(config, load_data(config, cache_dir), World(torch.device("cpu")))
    assert_same(planned(config, 1), found)


# Each with one precision of weights; int8 with bfloat16 ones, whose gradients are added in float32
STATES = {
    "float32": ["precision=fp32"],
    "bfloat16": ["precision=bf16_mixed", "optimizer.state_dtype=bfloat16"],
    "int8": ["precision=bf16", "optimizer.state_dtype=int8"],
}


@pytest.mark.parametrize("state", ["float32", "int8"])
@pytest.mark.parametrize("optimizer", FEW)
def test_the_plan_is_the_run(optimizer: str, state: str, tiny: list[str], cache_dir: Path) -> None:
    check_one_rank(optimizer, "llama_tiny", tiny, cache_dir, *STATES[state])


IN_BACKWARD = ["micro_batch_size=4", "optimizer.update_in_backward=true"]


@pytest.mark.long
@pytest.mark.parametrize("in_backward", [False, True], ids=["after", "in backward"])
@pytest.mark.parametrize("model", ["llama_tiny", "llama_9m"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_plan_is_the_run(
    optimizer: str, state: str, model: str, in_backward: bool, tiny: list[str], cache_dir: Path
) -> None:
    more = IN_BACKWARD if in_backward else []
    check_one_rank(optimizer, model, tiny, cache_dir, *STATES[state], *more)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso"])
def test_the_plan_knows_updates_in_the_backward_pass(
    optimizer: str, tiny: list[str], cache_dir: Path
) -> None:
    check_one_rank(optimizer, "llama_tiny", tiny, cache_dir, *STATES["int8"], *IN_BACKWARD)
    plans = {
        more: make_plan(config_of(optimizer, "llama_9m", tiny, "precision=bf16", *more), gpus=False)
        for more in (("micro_batch_size=4",), tuple(IN_BACKWARD))
    }
    after, within = plans.values()
    assert within.gradients.total < after.gradients.total / 3
    assert within.floor.total <= after.floor.total
    if optimizer != "rso":  # whose gradients are less here than what a refresh holds beside the activations
        assert within.peak < after.peak
    for kinds in within.phases.values():
        assert kinds[Kind.gradients.value] <= within.gradients.total


def test_one_micro_batch_has_gradients_in_the_dtype_of_its_weights(tiny: list[str]) -> None:
    found = {
        size: planned(config_of("adam", "llama_tiny", tiny, "precision=bf16", f"micro_batch_size={size}"), 1)
        for size in (4, 2)
    }
    weights = found[4]["memory/parameters_bytes"]
    assert found[4]["memory/gradients_bytes"] == weights
    gains = 4 * 64 * 5  # of two blocks and the last norm
    assert found[2]["memory/gradients_bytes"] == 2 * (weights - gains) + gains


def check_two_ranks(
    optimizers: list[str],
    model: str,
    tiny: list[str],
    cache_dir: Path,
    folder: Path,
    strategy: Strategy,
    *more: str,
) -> None:
    name = strategy.name
    configs = {o: config_of(o, model, tiny, f"parallelism={name}", *more) for o in optimizers}
    data = load_data(configs[optimizers[0]], cache_dir)
    checks: dict[str, Callable[[World], Any]] = {
        o: partial(live, config, data) for o, config in configs.items()
    }
    plans = {o: planned(config, 2) for o, config in configs.items()}
    # forked from a process that has planned, where nothing may be left of the plans' process groups
    found = ranks.run(2, checks, folder, strategy)
    for optimizer, plan in plans.items():
        assert_same(plan, ranks.succeeded(found[optimizer])[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy.fsdp, Strategy.ddp], ids=lambda s: s.name)
@pytest.mark.parametrize("state", ["float32", "int8"])
def test_the_plan_for_two_ranks_is_that_of_rank_0(
    state: str, strategy: Strategy, tiny: list[str], cache_dir: Path, tmp_path: Path
) -> None:
    few = ["adam", "galore", "rso_pca"]
    rest = ["optimizer.rest=adam_mini"] if state == "int8" else ["optimizer.rest=adam8bit"]
    check_two_ranks(few, "llama_tiny", tiny, cache_dir, tmp_path, strategy, *STATES[state], *rest)


@pytest.mark.long
@pytest.mark.parametrize("model", ["llama_tiny", "llama_9m"])
@pytest.mark.parametrize("state", STATES)
def test_every_plan_for_two_ranks_is_that_of_rank_0(
    state: str, model: str, tiny: list[str], cache_dir: Path, tmp_path: Path
) -> None:
    check_two_ranks(OPTIMIZERS, model, tiny, cache_dir, tmp_path, Strategy.fsdp, *STATES[state])


def profiled_peak(step: Callable[[], Any]) -> int:
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


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), tuple(IN_BACKWARD)], ids=["after", "in backward"])
@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso"])
def test_the_planned_peak_is_that_of_the_allocator(
    optimizer: str, more: tuple[str, ...], tiny: list[str], cache_dir: Path
) -> None:
    # The profiler sees every allocation, those inside kernels, too, of which the planner knows nothing:
    # at these sizes most of 10 % would be the packed operands of a matrix product.
    config = config_of(optimizer, "llama_9m", tiny, "seq_len=128", *more)
    trainer = Trainer(config, load_data(config, cache_dir))
    trainer.train_step()
    before = tensors_bytes(trainer.model.parameters()) + trainer.optimizer.state_bytes()
    measured = before + profiled_peak(trainer.train_step)
    with FakeRun(config, "cpu") as run:
        peaks = run.step(2).peaks()
    assert max(peak.total for peak in peaks.values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso"])
def test_the_planned_peak_is_that_of_the_gpu(optimizer: str, tiny: list[str], cache_dir: Path) -> None:
    config = config_of(optimizer, "llama_9m", tiny, "seq_len=128", "device=cuda")
    trainer = Trainer(config, load_data(config, cache_dir))
    trainer.train_step()
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step()
    measured = torch.cuda.max_memory_allocated()
    with FakeRun(config, "cuda") as run:
        peaks = run.step(2).peaks()
    assert max(peak.total for peak in peaks.values()) == pytest.approx(measured, rel=0.1)


def test_each_phase_holds_what_it_must(tiny: list[str]) -> None:
    config = config_of("galore", "llama_tiny", tiny, "optimizer.update_proj_gap=3")
    with FakeRun(config, "cpu") as run:
        quiet, refresh = run.step(2).peaks(), run.step(4).peaks()
        parameters = tensors_bytes(run.trainer.model.parameters())
        state = run.trainer.optimizer.state_bytes()
    assert quiet.keys() == {Phase.forward, Phase.backward, Phase.optimizer_step}
    assert refresh.keys() == quiet.keys() | {Phase.refresh}
    for peak in [*quiet.values(), *refresh.values()]:
        assert peak.by_kind[Kind.parameters] == parameters
        assert peak.by_kind[Kind.optimizer_state] == state
        assert peak.total == sum(peak.by_kind.values())
    assert quiet[Phase.forward].by_kind[Kind.activations] > 0
    assert quiet[Phase.optimizer_step].by_kind[Kind.gradients] == parameters  # fp32 weights, fp32 gradients
    assert refresh[Phase.refresh].by_kind[Kind.temporaries] > 0


@pytest.mark.slow
def test_a_plan_has_the_step_that_merges_adapters(tiny: list[str]) -> None:
    merging = ["optimizer.merge_every=3", "optimizer.restart_warmup_steps=1", "precision=bf16", "steps=5"]
    plan = make_plan(config_of("relora", "llama_tiny", tiny, *merging), gpus=False)
    assert Phase.refresh.value in plan.phases
    down = 64 * 176  # the largest weight: its product is whole in float32 for a moment
    assert plan.phases[Phase.refresh.value]["temporaries"] >= 4 * down
    assert Phase.refresh.value not in make_plan(config_of("lora", "llama_tiny", tiny), gpus=False).phases
    # weights with their adapters; gradients and states of the adapters alone
    elements = 2 * (4 * 64 * 64 + 3 * 64 * 176)
    factors = 2 * 16 * (4 * 2 * 64 + 3 * (64 + 176))
    assert plan.parameters.blocks == 2 * (elements + factors)
    assert plan.gradients.blocks == 4 * factors  # of two micro-batches in float32
    assert plan.optimizer_state.blocks == 2 * 4 * factors


@pytest.mark.slow
def test_a_pass_of_very_many_tokens_is_refused_at_once(tiny: list[str]) -> None:
    """Planning it would take hours; many short passes are planned as two."""
    with pytest.raises(UserError, match=r"one pass of 64,000,000 tokens .* give a micro_batch_size"):
        make_plan(compose([*tiny, "batch_size=1000000", "seq_len=64", "micro_batch_size=null"]))
    many = compose([*tiny, "batch_size=1000000", "seq_len=64", "micro_batch_size=1"])
    assert make_plan(many, gpus=False).peak > 0


def test_a_tracker_knows_when_a_storage_ends_and_what_it_was_for() -> None:
    tracker = MemoryTracker()
    with tracker:
        with tracker.phase(Phase.forward):
            kept = torch.zeros(100, dtype=torch.uint8)
            view = kept[:10]  # no bytes of its own
            torch.ones(50, dtype=torch.uint8)
        with tracker.phase(Phase.backward):
            torch.ones(30, dtype=torch.uint8)
            tracker.mark([view], Kind.activations)
        kept.untyped_storage().resize_(0)
        with tracker.phase(Phase.optimizer_step):
            torch.ones(7, dtype=torch.uint8)
    peaks = tracker.peaks()
    assert [peaks[phase].total for phase in (Phase.forward, Phase.backward, Phase.optimizer_step)] == [
        150,
        130,
        7,
    ]
    # what it was marked as it had been from the beginning
    assert peaks[Phase.forward].by_kind[Kind.activations] == 100
    assert peaks[Phase.forward].by_kind[Kind.temporaries] == 50


def test_a_loss_for_a_gpu_is_planned_where_there_is_none(tiny: list[str]) -> None:
    """A CPU's loss works on blocks of a cache's worth, a GPU's on everything at once."""
    config = compose([*tiny, *COMMON, "optimizer=adam", "seq_len=128", "tokenizer.vocab_size=8192"])
    peaks = {}
    for kind in ("cpu", "cuda"):
        with FakeRun(config, kind) as run:
            peaks[kind] = run.passes(2).peaks()[Phase.forward].by_kind[Kind.temporaries]
    assert peaks["cuda"] > peaks["cpu"]


def test_phases_are_watched_only_inside_the_block() -> None:
    seen: list[Phase] = []

    def watch(name: Phase) -> Any:
        seen.append(name)
        return nothing

    nothing = phase(Phase.forward)
    with watching(watch), phase(Phase.backward):
        pass
    with phase(Phase.forward):
        pass
    assert seen == [Phase.backward]


@pytest.mark.slow
def test_padding_is_masked_in_what_is_gathered(tiny: list[str]) -> None:
    """In fp32 the inputs are gathered as they are, unless some are padding: then from a copy without it."""
    common = ["model=llama_9m", "optimizer=rso_pca", "optimizer.update_proj_gap=3", "seq_len=256"]
    peaks = []
    for packing in ("packed", "padded"):
        config = compose([*tiny, *COMMON, *common, "precision=fp32", f"data.packing={packing}"])
        with FakeRun(config, "cpu") as run:
            peaks.append(run.passes(3).peaks()[Phase.forward].by_kind[Kind.temporaries])
    assert peaks[0] < peaks[1]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "last"), [("rso_pca", 6), ("galore", 7)])
def test_a_staggered_plan_has_the_largest_refresh(optimizer: str, last: int, tiny: list[str]) -> None:
    """Of 14 matrices (8 inputs) in 3 steps some step has down_proj's, another only those of the width."""
    more = ["optimizer.update_proj_gap=3", "optimizer.staggered=true", "steps=20"]
    plan = make_plan(config_of(optimizer, "llama_tiny", tiny, *more), gpus=False)
    peaks = []
    with FakeRun(config_of(optimizer, "llama_tiny", tiny, *more), "cpu") as run:
        for step in range(1, last):
            found = run.step(step).peaks()
            peaks.append(found[Phase.refresh].total if Phase.refresh in found else 0)
    assert plan.phases["refresh"]["peak"] == max(peaks)
