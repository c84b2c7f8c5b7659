"""Whole runs through the command: files, resume, kill, refusal, failure."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import Cli
from helpers.run_folders import assert_same_tensors
from helpers.runs import DIVERGING, compose

from rsotrain.checkpoints import saving
from rsotrain.errors import TrainingError
from rsotrain.running.mode import train

METRICS = {
    "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity", "val/bits_per_byte",
    "throughput/tokens_per_second", "throughput/mfu", "throughput/step_seconds", "memory/peak_bytes",
    "memory/parameters_bytes", "memory/gradients_bytes", "memory/optimizer_state_bytes",
    "memory/saved_activations_bytes", "step", "tokens", "time",
}  # fmt: skip
SUBSPACE_METRICS = {"subspace/overlap", "subspace/captured_energy", "subspace/refresh_seconds"}


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adam", "galore"])
def test_a_run_writes_what_the_design_names(
    optimizer: str, cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    refresh = ["optimizer.update_proj_gap=3"] if optimizer == "galore" else []
    command = [*tiny, f"optimizer={optimizer}", *refresh, "eval_every=3", "run_name=r"]
    result = cli(*command)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "outputs" / "r"
    summary = json.loads((run / "summary.json").read_text())
    expected = METRICS | (SUBSPACE_METRICS if optimizer == "galore" else set())
    assert expected <= summary.keys()
    history = records(run)
    assert expected <= {key for record in history for key in record}
    assert [r["step"] for r in history if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in history if "val/loss" in r] == [3, 6]
    assert summary["step"] == 6
    assert summary["tokens"] == 6 * 4 * 32
    assert summary["best/val/loss"] == min(r["val/loss"] for r in history if "val/loss" in r)
    assert summary["val/unigram_perplexity"] > 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    for text in (
        "validation loss",
        "perplexity",
        "unigram",
        "bits per byte",
        "tokens per second",
        "metrics.jsonl",
    ):
        assert text in result.stdout.lower()
    assert (run / "train.log").read_text()
    again = cli(*command)
    assert again.returncode == 0
    assert "is finished already" in again.stdout
    assert json.loads((run / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_the_default_name_tells_runs_apart(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    for extra in ([], ["optimizer.lr=0.001"], ["log_every=2"]):
        assert cli(*tiny, "steps=1", *extra).returncode == 0
    names = sorted(p.name for p in (tmp_path / "outputs").iterdir())
    assert len(names) == 2  # how often a run logs does not make it another run
    assert all(name.startswith("llama_tiny-rso_pca-svd-seed0-") for name in names)


@pytest.mark.slow
def test_members_of_a_wandb_sweep_have_folders_of_their_own(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    for member in ("m1", "m2", "m1"):
        assert cli(*tiny, "steps=1", WANDB_SWEEP_ID="s", WANDB_RUN_ID=member).returncode == 0
    names = sorted(p.name for p in (tmp_path / "outputs").iterdir())
    assert [name.rsplit("-", 1)[1] for name in names] == ["m1", "m2"]
    assert names[0].rsplit("-", 1)[0] == names[1].rsplit("-", 1)[0]
    for name, member in zip(names, ("m1", "m2"), strict=True):
        record = json.loads((tmp_path / "outputs" / name / "run.json").read_text())
        assert (record["run_id"], record["state"]) == (member, "finished")


@pytest.mark.slow
def test_the_same_command_resumes_and_other_settings_are_refused(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    command = [*tiny, "run_name=r", "steps=500", "save_every=1000"]
    stopped = cli(*command, "max_seconds=0.5")
    assert stopped.returncode == 75
    assert "stopped by max_seconds=0.5 after step" in stopped.stdout
    refused = cli(*command, "optimizer.lr=0.1")
    assert refused.returncode == 2
    assert "holds a run with other settings (optimizer.lr: 0.02 there, 0.1 here)" in refused.stderr
    resumed = cli(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    steps = [r["step"] for r in records(tmp_path / "outputs/r") if "train/loss" in r]
    assert steps == list(range(1, 501))
    straight = cli(*command[:-3], "run_name=s", *command[-2:])
    assert straight.returncode == 0
    last = "checkpoints/step_00000500"
    assert_same_tensors(tmp_path / "outputs/r" / last, tmp_path / "outputs/s" / last)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "galore"])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    optimizer: str, cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    extra = [f"optimizer={optimizer}", "steps=60", "save_every=7", "precision=bf16_mixed"]
    command = [*[o for o in tiny if not o.startswith(("steps=", "save_every=", "precision="))], *extra]
    assert cli(*command, "run_name=straight").returncode == 0
    checkpoints = tmp_path / "outputs/killed/checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-m", "rsotrain", *command, "run_name=killed"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "outputs/killed/summary.json").exists()
    resumed = cli(*command, "run_name=killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    assert_same_tensors(
        checkpoints / "step_00000060", tmp_path / "outputs/straight/checkpoints/step_00000060"
    )
    pick = ("step", "tokens", "train/loss", "val/loss")
    histories = [
        [{k: r[k] for k in pick if k in r} for r in records(tmp_path / "outputs" / name)]
        for name in ("straight", "killed")
    ]
    assert histories[0] == histories[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGINT,
        *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_exits_with_75(number: int, tmp_path: Path, tiny: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rsotrain", *tiny, "steps=100000", "save_every=null", "run_name=r"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "outputs/r/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {signal.Signals(number).name} after step" in out
    (checkpoint,) = (tmp_path / "outputs/r/checkpoints").iterdir()
    assert f"step_{records(tmp_path / 'outputs/r')[-1]['step']:08d}" == checkpoint.name


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    result = cli(
        *tiny,
        *DIVERGING,
        "lr_scheduler=constant",
        "lr_scheduler.warmup_fraction=0",
        "save_every=1",
        "run_name=r",
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert (
        "stopped before the update, the last good checkpoint is outputs/r/checkpoints/step_" in result.stderr
    )
    assert not (tmp_path / "outputs/r/summary.json").exists()
    assert list((tmp_path / "outputs/r/checkpoints").iterdir())


def test_two_processes_do_not_share_a_folder(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    import fcntl

    folder = tmp_path / "outputs" / "r"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = cli(*tiny, "run_name=r")
    assert result.returncode == 2
    assert "another process is at work in outputs/r" in result.stderr


@pytest.mark.slow
def test_overwrite_discards_the_old_run_and_nothing_else(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    assert cli(*tiny, "run_name=r").returncode == 0
    notes = tmp_path / "outputs/r/notes.txt"
    notes.write_text("mine")
    result = cli(*tiny, "run_name=r", "optimizer.lr=0.002", "steps=2", "overwrite=true")
    assert result.returncode == 0, result.stderr
    assert [r["step"] for r in records(tmp_path / "outputs/r") if "train/loss" in r] == [1, 2]
    assert notes.read_text() == "mine"
    assert [p.name for p in (tmp_path / "outputs/r/checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    command = [*tiny, "steps=500", "save_every=1", "run_name=r"]
    assert cli(*command, "max_seconds=1.5").returncode == 75
    newest = max((tmp_path / "outputs/r/checkpoints").iterdir())
    with open(newest / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(newest / "model.safetensors") // 2)
    result = cli(*command, "max_seconds=1.5")
    assert result.returncode == 75
    assert f"warning: {newest.name} cannot be read and is passed over" in result.stdout
    assert f"resumed from outputs/r/checkpoints/step_{int(newest.name[5:]) - 1:08d}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_final_checkpoint_that_cannot_be_written_is_a_failure(
    number: int, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_checkpoint(*arguments: object, **settings: object) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    with pytest.raises(TrainingError) as raised:
        train(compose([*tiny, f"output_dir={tmp_path}", "run_name=r"]))
    said = str(raised.value)
    assert said.startswith(f"the checkpoint of step 6 could not be written: {os.strerror(number)}")
    assert ("make room" in said) == (number == errno.ENOSPC)
    assert "warning: the checkpoint of step 2 was not written" in (tmp_path / "r/train.log").read_text()
    assert not (tmp_path / "r/summary.json").exists()


@pytest.mark.slow
def test_a_refused_start_does_not_occupy_the_name(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    refused = cli(*tiny, "run_name=r", "optimizer.block_parameters=[zzz]")
    assert refused.returncode == 2
    assert "zzz" in refused.stderr
    assert not (tmp_path / "outputs").exists()  # refused before anything was made
    assert cli(*tiny, "run_name=r", "tokenizer.vocab_size=100000").returncode == 2
    assert not (tmp_path / "outputs").exists()  # though it takes the data to see that
    (tmp_path / "outputs/r").mkdir(parents=True)
    (tmp_path / "outputs/r/notes.txt").write_text("mine")
    assert cli(*tiny, "run_name=r", "tokenizer.vocab_size=100000").returncode == 2
    assert (tmp_path / "outputs/r/notes.txt").read_text() == "mine"
    assert cli(*tiny, "run_name=r").returncode == 0


@pytest.mark.slow
def test_other_data_under_the_same_path_is_refused(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    own = tmp_path / "train.jsonl"
    path = next(o for o in tiny if o.startswith("data.path="))
    own.write_bytes(Path(path.removeprefix("data.path=")).read_bytes())
    command = [*[o for o in tiny if o != path], f"data.path={own}", "run_name=r"]
    assert cli(*command, "steps=100000", "max_seconds=0.2").returncode == 75
    own.write_text(own.read_text() * 2)
    result = cli(*command, "steps=100000", "max_seconds=0.2")
    assert result.returncode == 2
    assert "the data or the tokenizer have changed since" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "status", "sentence"),
    [
        ("config.yaml", "a: [", 2, "config.yaml is damaged"),
        pytest.param("config.yaml", "", 2, "config.yaml is damaged", marks=pytest.mark.long),
        pytest.param("run.json", "", 75, "resumed from", marks=pytest.mark.long),
        ("summary.json", "[]", 75, "resumed from"),
    ],
)
def test_damaged_small_files(
    name: str, content: str, status: int, sentence: str, cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    command = [*tiny, "run_name=r", "steps=100000", "max_seconds=0.2"]
    assert cli(*command).returncode == 75
    (tmp_path / "outputs/r" / name).write_text(content)
    result = cli(*command)
    assert result.returncode == status
    assert sentence in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_lost_summary_is_written_again_in_full(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    assert cli(*tiny, "run_name=r").returncode == 0
    file = tmp_path / "outputs/r/summary.json"
    before = json.loads(file.read_text())
    file.unlink()
    assert cli(*tiny, "run_name=r").returncode == 0
    after = json.loads(file.read_text())
    assert after.keys() == before.keys()
    assert {k: after[k] for k in ("train/loss", "val/loss", "tokens")} == {
        k: before[k] for k in ("train/loss", "val/loss", "tokens")
    }


@pytest.mark.slow
def test_max_seconds_ends_one_run_of_a_multirun_and_not_the_rest(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    result = cli("-m", *tiny, "steps=100000", "max_seconds=0.2", "seed=0,1")
    assert result.returncode == 75
    assert result.stdout.count("stopped by max_seconds=0.2") == 2
    assert len({p.parent for p in (tmp_path / "outputs").glob("*/checkpoints/step_*")}) == 2


def test_an_experiment_sets_top_level_keys_and_the_command_line_wins(tmp_path: Path) -> None:
    config = compose(["experiment=galore_60m"])
    assert (config.steps, config.batch_size, config.model.name) == (10000, 512, "llama_60m")
    assert (config.optimizer.name, config.sampler.name) == ("galore", "svd")
    assert compose(["experiment=galore_60m", "steps=3"]).steps == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param("", "is empty", marks=pytest.mark.long),
        ("{not json\n", "JSON"),
        ('{"body": "x"}\n', "text"),
        pytest.param('{"text": "too short"}\n', "seq_len", marks=pytest.mark.long),
    ],
)
def test_bad_data_files(content: str, sentence: str, cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    result = cli(*[o for o in tiny if not o.startswith("data.validation")], "data.validation_path=bad.jsonl")
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
