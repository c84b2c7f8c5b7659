"""mode=benchmark and its parts; speed itself, as far as a noisy machine can tell: see test_speed.py."""

import json
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ranks
from helpers.command import Cli
from helpers.runs import compose

from rsotrain.benchmark import BACKWARD, DATA, FORWARD, OPTIMIZER, OTHER, PHASES, REFRESH
from rsotrain.benchmark.phases import PhaseClock, attach, covered
from rsotrain.benchmark.tables import labels
from rsotrain.config.rules_modes import check_read
from rsotrain.config.schema import Config, Strategy
from rsotrain.config.validation import validate
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.errors import UserError
from rsotrain.parallel.ranks import World
from rsotrain.training.random_data import NUM_BATCHES, random_data, vocabulary_size
from rsotrain.training.refreshes import all_bases_due, update_gap
from rsotrain.training.trainer import Trainer

SMALL = ["model=llama_tiny", "tokenizer.vocab_size=300", "seq_len=16", "batch_size=4", "precision=fp32"]


def trainer(*overrides: str, world: World | None = None) -> Trainer:
    config = compose([*SMALL, *overrides])
    return Trainer(config, random_data(config), world)


def test_phases_are_told_apart_and_add_up() -> None:
    """Each part of a step is made to take a known time; what is not named is ``other``."""
    clock, pause = PhaseClock(torch.device("cpu")), 0.02

    def part() -> None:
        time.sleep(pause)

    refresh = clock.timed(part, REFRESH)

    def update() -> None:
        part()
        refresh()
        part()

    forward = clock.timed(part, FORWARD, BACKWARD)
    optimizer = clock.timed(update, OPTIMIZER, OTHER)

    def step() -> None:
        for _ in range(2):
            forward()
            part()  # backward
        optimizer()
        part()

    start = time.perf_counter()
    seconds = clock.step(step)
    elapsed = time.perf_counter() - start
    expected = {DATA: 0, FORWARD: 2, BACKWARD: 2, OPTIMIZER: 2, REFRESH: 1, OTHER: 1}
    for phase, number in expected.items():
        # a sleep is never shorter, and of a loaded machine may be much longer
        assert seconds[phase] >= number * pause * 0.99
        assert (number == 0) == (seconds[phase] == 0)
    assert sum(seconds.values()) == pytest.approx(elapsed, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adam", "galore", "osd", "rso", "rso_pca", "muon"])
def test_a_timed_trainer_trains_as_it_did(optimizer: str) -> None:
    """Bitwise, and every phase that the method has takes time."""
    gap = ["optimizer.update_proj_gap=2"] if optimizer not in ("adam", "osd", "muon") else []
    plain, timed = (trainer(f"optimizer={optimizer}", "micro_batch_size=2", *gap) for _ in range(2))
    clock = PhaseClock(timed.device)
    attach(clock, timed)
    seen = dict.fromkeys(PHASES, 0.0)
    for _ in range(4):
        plain.train_step()
        seconds = clock.step(timed.train_step)
        seen = {phase: seen[phase] + seconds[phase] for phase in PHASES}
    for (name, a), (_, b) in zip(plain.model.named_parameters(), timed.model.named_parameters(), strict=True):
        assert a.equal(b), name
    assert all(seen[phase] > 0 for phase in PHASES if phase != REFRESH)
    assert (seen[REFRESH] > 0) == (update_gap(timed) is not None)


@pytest.mark.parametrize(
    "options", [["galore"], ["galore", "optimizer.staggered=true"], ["rso_pca"], ["osd"]]
)
def test_all_bases_can_be_made_due(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each basis is sampled once in that step, and not for the first time; the schedule is then as before."""
    optimizer, *rest = options
    here = trainer(f"optimizer={optimizer}", *rest)
    here.train_step()
    group: Any = here.optimizer.groups[0]
    sampled: list[tuple[str, int]] = []
    settle = group.bases._settle

    def settled(name: str, old: Any, new: Any, step: int, index: int) -> Any:
        assert new is not None
        sampled.append((name, index))
        return settle(name, old, new, step, index)

    monkeypatch.setattr(group.bases, "_settle", settled)
    schedule = group.bases.schedule
    for _ in range(2):
        sampled.clear()
        with all_bases_due(here):
            here.train_step()
        assert sorted(name for name, _ in sampled) == sorted(group.bases.sizes)
        assert all(index > 0 for _, index in sampled)
    assert group.bases.schedule is schedule
    assert here.optimizer.steps_done == 1


def test_what_a_refresh_entails_is_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring what the new bases capture comes with them; gaussian ones are made orthonormal for it."""
    here = trainer("optimizer=apollo")
    group: Any = here.optimizer.groups[0]
    record, measured = group.bases.record, list[str]()

    def observe(name: str, *args: Any) -> None:
        measured.append(name)
        record.unobserved.discard(name)
        time.sleep(0.01)

    monkeypatch.setattr(record, "observe", observe)
    clock = PhaseClock(here.device)
    attach(clock, here)
    here.train_step()
    measured.clear()
    with all_bases_due(here):
        seconds = clock.step(here.train_step)
    assert measured
    assert seconds[REFRESH] > 0.0099 * len(measured)


def test_peak_memory_is_not_that_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose matrices are larger on a GPU than a small model: one is before the peak begins, one after."""
    from rsotrain.benchmark import mode

    events: list[str] = []

    def noted(name: str, value: float) -> Any:
        def call(*_: object) -> float:
            events.append(name)
            return value

        return call

    monkeypatch.setattr(mode, "matmul_flops_per_second", noted("product", 1e9))
    monkeypatch.setattr(mode, "forget_peak_memory", noted("begin", 0))
    monkeypatch.setattr(mode, "peak_memory_bytes", noted("read", 1))
    monkeypatch.setattr(mode, "_make_folder", lambda _: Path("unused"))
    monkeypatch.setattr(mode, "write_json_atomic", lambda *_: None)
    mode.benchmark_mode(compose([*SMALL, "optimizer=adam", "benchmark.steps=1", "benchmark.warmup_steps=1"]))
    assert events == ["product", "begin", "read", "product"]


def test_covered_is_the_length_of_a_union() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 1.5)]) == 5


def test_random_data_needs_no_file(tmp_path: Path) -> None:
    config = compose([*SMALL, "data=files", f"data.path={tmp_path}/none", "data.validation_path=none"])
    data = random_data(config)
    first, again = (d.train.batch(d.train.order(0).indices(0, 4)) for d in (data, random_data(config)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].max() < 300
    assert vocabulary_size(compose(["tokenizer.vocab_size=500"])) == 500


def test_random_data_is_padded_where_the_run_would_be() -> None:
    config = compose([*SMALL, "data.packing=padded"])
    data = random_data(config)
    inputs, targets = data.train.batch(np.arange(len(data.train)))
    counted = (targets != IGNORE_INDEX).sum(1)
    length = config.seq_len
    assert len(inputs) == NUM_BATCHES * config.batch_size
    assert length // 2 <= counted.min() < counted.max() <= length
    assert inputs.max() < 300
    for row, (tokens, scored) in enumerate(zip(inputs, targets, strict=True)):
        number = int(counted[row])
        assert torch.equal(tokens[1:number], scored[: number - 1])  # the tokens moved left by one
        assert (scored[number:] == IGNORE_INDEX).all()
    assert trainer("data.packing=padded").train_step().loss > 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["benchmark.profile=true"], "benchmark.profile=true is for mode=benchmark"),
        (["mode=benchmark", "checkpoint.path=."], "mode=benchmark times a fresh model"),
        (["mode=benchmark", "benchmark.steps=0"], "benchmark.steps=0 must be positive"),
        (["mode=benchmark", "benchmark.warmup_steps=0"], "benchmark.warmup_steps=0 must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(compose(overrides))


@pytest.mark.slow
def test_the_command_writes_json_and_a_trace_and_compares(cli: Cli, tmp_path: Path) -> None:
    short = ["mode=benchmark", *SMALL, "benchmark.steps=2", "benchmark.warmup_steps=1"]
    one = cli(*short, "optimizer=galore", "run_name=r", "benchmark.profile=true")
    assert one.returncode == 0, one.stderr
    result = json.loads((tmp_path / "outputs/benchmarks/r.json").read_text())
    seconds = {phase: result[f"phase/{phase}_seconds"] for phase in PHASES}
    assert result["throughput/step_seconds"] == pytest.approx(sum(seconds.values()))
    assert seconds[REFRESH] == pytest.approx(result["refresh/seconds"] / 200)
    assert result["throughput/tokens_per_second"] == pytest.approx(64 / sum(seconds.values()))
    assert 0 < result["throughput/mfu"] < 1
    assert result["memory/peak_bytes"] > 0
    assert result["settings"]["optimizer.name"] == "galore"
    events = json.loads((tmp_path / "outputs/benchmarks/r.trace.json").read_text())["traceEvents"]
    assert {f"phase:{phase}" for phase in (DATA, FORWARD, OPTIMIZER)} <= {e.get("name") for e in events}
    for phase in PHASES:
        assert phase in one.stdout
    several = cli("-m", *short, "optimizer=adam,rso")
    assert several.returncode == 0, several.stderr
    table = several.stdout.rpartition("Benchmark")[2]
    assert "adam" in table
    assert "rso haar" in table
    # nothing that looks like a run, or lies in one
    assert [path.name for path in (tmp_path / "outputs").iterdir() if path.is_dir()] == ["benchmarks"]
    assert len(list((tmp_path / "outputs/benchmarks").iterdir())) == 4


@pytest.mark.parametrize("key", ["data", "data.path", "eval_every", "evaluation.patience", "cache_dir"])
def test_what_no_training_step_depends_on_is_refused(key: str) -> None:
    config = compose(["mode=benchmark"])
    with pytest.raises(UserError, match=rf"so {key} would do nothing; leave it out"):
        check_read(config, ["model", "data.packing", key])


def test_each_setting_is_read_or_refused() -> None:
    """A new one has to be put somewhere."""
    config = compose(["mode=benchmark"])
    read = set()
    for field in fields(Config):
        with suppress(UserError):
            check_read(config, [field.name])
            read.add(field.name)
    assert read == {
        "mode",
        "steps",
        "epochs",
        "batch_size",
        "micro_batch_size",
        "seq_len",
        "seed",
        "device",
        "precision",
        "grad_clip",
        "z_loss",
        "max_bad_steps",
        "spike_factor",
        "compile",
        "deterministic",
        "activation_checkpointing",
        "run_name",
        "output_dir",
        "model",
        "optimizer",
        "sampler",
        "tokenizer",
        "lr_scheduler",
        "parallelism",
        "logger",
        "benchmark",
    }  # fmt: skip  (epochs are refused by a rule of their own)


@pytest.mark.slow
def test_ranks_share_the_work(tmp_path: Path) -> None:
    """Two ranks: each has half the batch, communication is seen, and the results are the same on both."""
    config: Config = compose([*SMALL, "optimizer=rso", "parallelism=fsdp", "benchmark.steps=2"])

    def check(world: World) -> dict[str, Any]:
        from rsotrain.benchmark.mode import _measure

        return _measure(Trainer(config, random_data(config), world), tmp_path, first_rate=1.0)

    first, second = ranks.succeeded(ranks.run(2, {"c": check}, tmp_path / "ranks", Strategy.fsdp)["c"])
    assert first["phase/communication_seconds"] > 0
    for key in ("throughput/step_seconds", "matmul_flops_per_second", "memory/peak_bytes"):
        assert first[key] == second[key]
    assert first["tokens_per_step"] == 64


def test_labels_tell_results_apart() -> None:
    def result(**settings: object) -> dict[str, Any]:
        return {"settings": {key.replace("_", ".", 1): value for key, value in settings.items()}}

    named = [
        result(optimizer_name="adam", optimizer_rank=None),
        result(optimizer_name="rso", optimizer_rank=4),
    ]
    assert labels(named) == ["adam", "rso"]  # the rank follows from the name
    ranked = [*named, result(optimizer_name="rso", optimizer_rank=8)]
    assert labels(ranked) == ["adam", "rso rank=4", "rso rank=8"]
    assert labels([named[0], named[0]]) == ["same settings", "same settings"]
