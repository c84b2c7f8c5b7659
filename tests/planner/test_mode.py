"""mode=plan from the command line, GPUs that hold a run, and the sentence when memory ends."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command import Cli
from helpers.runs import compose

from rsotrain.config.schema import Config, Strategy
from rsotrain.config.validation import validate
from rsotrain.errors import TrainingError, UserError
from rsotrain.instruments.memory import memory_metrics
from rsotrain.optim.galore import GaLore
from rsotrain.optim.state_size import StateSize
from rsotrain.parallel.ranks import World
from rsotrain.planner import out_of_memory
from rsotrain.planner.cards import GPUS
from rsotrain.planner.fake_run import tokenizer_size
from rsotrain.planner.gpus import fits
from rsotrain.planner.plan import Plan, make_plan
from rsotrain.planner.show import labels, print_plan

MIB = 2**20


def plan_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("outputs/plans/*.json"))


@pytest.mark.slow
def test_a_plan_is_printed_and_written(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "mode=plan", "model=llama_tiny", "optimizer=galore", "parallelism=fsdp", "parallelism.world_size=4",
        "batch_size=16", "micro_batch_size=2", "seq_len=64",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for text in (
        "llama_tiny, galore: memory by phase, MiB (2 × 64 tokens, rank 0 of 4)",
        "one that samples new bases",
        "refresh",
        "by its formula",
        "141 GB",
        "FLOPs per token",
    ):
        assert text in result.stdout
    (file,) = plan_files(tmp_path)
    plan = json.loads(file.read_text())
    assert plan["optimizer_state"] == plan["formula_state"]
    assert plan["peak"] == max(phase["peak"] for phase in plan["phases"].values())
    assert plan["phases"]["forward"]["gathered"] > 0
    # two micro-batches a rank: each gathers all weights but the root's, which stay whole until the backward
    assert plan["traffic"]["step"]["allgather"] > 0
    # the bases are drawn by products of sharded matrices, whose sums over ranks are small
    step, refresh = plan["traffic"]["step"], plan["traffic"]["refresh"]
    assert step["allreduce"] < refresh["allreduce"] < refresh["reduce_scatter"]
    assert [fit["fits"] for fit in plan["gpus"]] == [True] * 5
    assert (file.with_suffix(".png")).is_file()
    assert not (file.parent / "config.yaml").exists()  # it is no run


@pytest.mark.slow
def test_several_plans_end_in_one_table(cli: Cli, tmp_path: Path) -> None:
    result = cli("mode=plan", "-m", "optimizer=adam,rso", "model=llama_tiny", "seq_len=64")
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("Memory of one rank") :]
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    assert [row[0] for row in rows if row[0]] == ["adam", "rso"] * 2  # memory, and time
    assert rows[-2][-1].endswith("1.00")
    assert len(plan_files(tmp_path)) == 2
    assert (tmp_path / "outputs" / "plans.png").is_file()
    assert list(json.loads((tmp_path / "outputs" / "plans.json").read_text())) == ["adam", "rso"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["parallelism=fsdp"], "say how many to plan for with parallelism.world_size"),
        (["parallelism.world_size=2"], "parallelism=single is for one process, but 2 were asked for"),
        (["parallelism=hsdp", "parallelism.world_size=8"], "say of how many processes"),
        (["seq_len=2048"], "longer than model.max_position_embeddings=1024"),
        (["parallelism=fsdp", "parallelism.world_size=3"], "batch_size=8 does not divide among 3 processes"),
        (
            ["parallelism=hsdp", "parallelism.world_size=8", "parallelism.shard_size=3"],
            "does not divide the 8",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(compose(["mode=plan", *overrides]))


def test_settings_that_do_not_fit_together_are_refused_as_by_a_run() -> None:
    config = compose(["mode=plan", "model=llama_tiny", "optimizer=rso", "sampler=svd", "sampler.solver=full"])
    with pytest.raises(UserError, match="which RSO never forms"):
        make_plan(config)


def test_the_size_of_the_vocabulary_needs_no_data(tmp_path: Path) -> None:
    assert tokenizer_size(compose(["tokenizer.vocab_size=777"])) == 777
    missing = ["tokenizer=sentencepiece", f"tokenizer.path={tmp_path}/none.model"]
    assert tokenizer_size(compose([*missing, "model.vocab_size=32000"])) == 32000
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer_size(compose(missing))


# --- GPUs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
@pytest.mark.parametrize("seq_len", [256, 2048])
def test_the_largest_micro_batch_fits_and_the_next_does_not(micro_batch: int, seq_len: int) -> None:
    calls: list[int] = []

    def peak_of(size: int) -> int:  # two moments of the passes, and logits until they are divided
        calls.append(size)
        logits = 100 * MIB * min(size, 8)
        return logits + max(6_000 * MIB + 300 * MIB * size, 5_000 * MIB + 450 * MIB * size)

    found = fits(peak_of, 9_000 * MIB, seq_len, micro_batch, 8 * seq_len)
    assert len(calls) <= 7
    for gpu, fit in zip(GPUS, found, strict=True):
        assert fit.fits == (peak_of(micro_batch) <= gpu.usable)
        assert peak_of(fit.micro_batch) <= gpu.usable  # what is said to fit does
        exact = max(size for size in range(400) if peak_of(size) <= gpu.usable)
        assert exact - 1 <= fit.micro_batch <= exact  # a chord over the bend may cost a sequence


def test_a_run_too_large_for_a_gpu_has_no_micro_batch() -> None:
    found = fits(lambda size: 10_000 * MIB + 100 * MIB * size, 30_000 * MIB, 1024, 2, 4096)
    assert [fit.micro_batch for fit in found[:1]] == [0]
    assert [fit.fits for fit in found] == [False, True, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("smallest", [4, 32])  # of one chunk of the loss, and of two or more
@pytest.mark.parametrize("optimizer", ["adam", "rso_pca"])
def test_peaks_between_planned_micro_batches_are_close(optimizer: str, smallest: int) -> None:
    # The line through planned sizes is what a plan of the sizes between says, to the rounding of blocks.
    common = ["model=llama_tiny", f"optimizer={optimizer}", "seq_len=256", "batch_size=128"]
    peaks = {
        size: make_plan(compose([*common, f"micro_batch_size={size}"]), gpus=False).peak
        for size in (smallest, 2 * smallest, 4 * smallest)
    }
    first, middle, last = peaks.values()
    assert middle == pytest.approx(first + (last - first) / 3, rel=0.01)


def test_labels_name_what_differs() -> None:
    adam = make_plan(compose(["model=llama_tiny", "optimizer=adam"]), gpus=False).settings
    rso = adam | {"optimizer": "rso", "sampler": "haar", "rank": 0.25, "staggered": False}
    assert labels([adam, rso]) == ["adam", "rso"]
    assert labels([rso, rso | {"rank": 0.5}]) == ["rank=0.25", "rank=0.5"]
    assert labels([rso, rso | {"optimizer": "adam"}, rso | {"world_size": 8}]) == [
        "rso world_size=1",
        "adam world_size=1",
        "rso world_size=8",
    ]
    assert labels([rso, rso | {"staggered": True}]) == ["as given", "staggered=True"]
    assert labels([adam, rso, rso | {"rank": 0.5}]) == [
        "adam",
        "rso haar rank=0.25",
        "rso haar rank=0.5",
    ]
    assert labels([rso, rso]) == ["1", "2"]


# --- no memory left ------------------------------------------------------------------------------------


def test_the_ends_of_memory_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory.is_out_of_memory(raised.value)
    assert out_of_memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory.is_out_of_memory(MemoryError())
    assert out_of_memory.is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert out_of_memory.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not out_of_memory.is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not out_of_memory.is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.slow
def test_the_sentence_names_the_largest_part_and_three_ways_out() -> None:
    config = compose(["model=llama_tiny", "optimizer=adam", "seq_len=256", "device=cpu"])
    with (
        pytest.raises(TrainingError) as raised,
        out_of_memory.explaining_out_of_memory(config, World(torch.device("cpu"))),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    said = str(raised.value)
    assert "out of memory (no room for another 1048576 TiB); of the planned peak of" in said
    assert "the largest part is" in said
    assert said.count("would save") == 3
    assert "activation_checkpointing=block would save" in said


@pytest.mark.slow
def test_the_peak_of_a_large_micro_batch_is_found_from_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["model=llama_tiny", "optimizer=adam", "seq_len=256", "device=cpu", "batch_size=12"])
    planned: list[int] = []

    def counted(config: Config, *, gpus: bool = True) -> Plan:
        plan = make_plan(config, gpus=gpus)
        planned.append(plan.settings["micro_batch_size"])
        return plan

    whole = make_plan(config, gpus=False)
    monkeypatch.setattr("rsotrain.planner.plan.make_plan", counted)
    monkeypatch.setattr(out_of_memory, "_MAX_TOKENS", 8 * 256)
    found = out_of_memory.planned_peak(config)
    assert found == max(whole.phases.values(), key=lambda phase: phase["peak"])
    assert planned == [4, 8]
    planned.clear()
    first = out_of_memory.options
    monkeypatch.setattr(out_of_memory, "options", lambda config: [next(first(config))])  # each takes a second
    said = out_of_memory.advice(replace(config, batch_size=1_000_000))
    assert "micro_batch_size=500000 would save" in said
    assert max(planned) == 8


def test_other_errors_pass() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes differ") as raised,
        out_of_memory.explaining_out_of_memory(compose([]), World(torch.device("cpu"))),
    ):
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, TrainingError)


def changes(config: Config) -> dict[str, Config]:
    return {option.change: option.config for option in out_of_memory.options(config)}


def test_ways_out_are_what_the_run_does_not_do_yet() -> None:
    found = changes(compose(["optimizer=galore", "optimizer.rank=64", "batch_size=12", "micro_batch_size=6"]))
    assert set(found) == {
        "micro_batch_size=3", "activation_checkpointing=block", "precision=bf16", "optimizer=rso",
        "optimizer.state_dtype=int8", "optimizer.rest=adam8bit", "optimizer.rank=32",
        "parallelism=fsdp on 2 processes",
    }  # fmt: skip
    assert found["parallelism=fsdp on 2 processes"].parallelism.strategy is Strategy.fsdp
    none_left = [
        "optimizer=rso", "optimizer.projection=regenerated", "optimizer.state_dtype=int8",
        "precision=bf16", "activation_checkpointing=block", "batch_size=1", "optimizer.rank=1",
    ]  # fmt: skip
    assert changes(compose(none_left)) == {}


@pytest.mark.slow
def test_grams_of_all_inputs_at_once_are_named_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    at_once = compose(["optimizer=rso_pca", "model=llama_tiny", "device=cpu", "batch_size=1"])
    in_turn = changes(at_once)["optimizer.staggered=true"]
    assert in_turn == compose([
        "optimizer=rso_pca", "model=llama_tiny", "device=cpu", "batch_size=1", "optimizer.staggered=true"
    ])  # fmt: skip
    assert "optimizer.staggered=true" not in changes(in_turn)
    for never in (["optimizer=rso"], ["optimizer=rso_pca", "optimizer.update_proj_gap=1"]):
        assert "optimizer.staggered=true" not in changes(compose(never))
    print_plan(make_plan(at_once, gpus=False))
    assert "optimizer.staggered=true holds" in capsys.readouterr().out
    print_plan(make_plan(in_turn, gpus=False))
    assert "staggered" not in capsys.readouterr().out


def test_on_a_gpu_what_remains_of_the_peak_is_logged_too() -> None:
    parts = {"memory/parameters_bytes": 10, "memory/gradients_bytes": 5}
    assert memory_metrics(parts, 40, "cuda")["memory/gathered_and_temporaries_bytes"] == 25
    assert memory_metrics(parts, 40, "cpu") == parts | {"memory/peak_bytes": 40}


@pytest.mark.slow
def test_a_state_that_is_not_its_formula_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(["model=llama_tiny", "optimizer=galore", "device=cpu", "seq_len=16", "batch_size=1"])
    print_plan(make_plan(config, gpus=False))
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(GaLore, "matrix_state", classmethod(lambda cls, config, matrix: StateSize()))
    print_plan(make_plan(config, gpus=False))
    said = capsys.readouterr().out
    assert "warning: the optimizer state has" in said
    assert "by the formula of optimizer=galore it has" in said
