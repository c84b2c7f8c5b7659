"""Whole runs on several ranks: one folder, preemption, resuming on other numbers of ranks, failures."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.run_folders import assert_near, stopping, weights
from helpers.runs import DIVERGING, compose
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from rsotrain.checkpoints import files as checkpoint
from rsotrain.checkpoints import saving
from rsotrain.checkpoints.files import list_checkpoints, load_checkpoint, load_tensors
from rsotrain.config.schema import Config
from rsotrain.errors import TrainingError, UserError
from rsotrain.parallel.ranks import World
from rsotrain.running.mode import train

pytestmark = pytest.mark.slow  # ranks that train for all of them

RUN = [
    "batch_size=12", "steps=8", "save_every=2", "eval_every=4", "parallelism=fsdp", "optimizer=galore",
    "optimizer.update_proj_gap=3", "optimizer.eps=1e-4", "keep_checkpoints=5",
]  # fmt: skip


def expecting(kind: type[Exception], config: Config, world: World) -> str:
    with pytest.raises(kind) as raised:
        train(config)
    return str(raised.value)


def full_disk(config: Config, world: World) -> float:
    """Rank 1 cannot write the checkpoint of step 4."""
    original = HuggingFaceStorageWriter.write_data

    def write_data(self: HuggingFaceStorageWriter, *arguments: Any) -> Any:
        if world.rank == 1 and "00000004" in str(self.path):
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
    try:
        return train(config)["val/loss"]
    finally:
        HuggingFaceStorageWriter.write_data = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def shared(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that is stopped on 4 ranks, goes on on 2, then on 3, then on 1; and others on the way."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, *extra: str) -> Config:
        chosen = dict(o.split("=", 1) for o in [*tiny, *RUN, *extra])
        if chosen["optimizer"] == "adam":
            del chosen["optimizer.update_proj_gap"]
        named = {"output_dir": folder, "run_name": name}
        return compose([f"{key}={value}" for key, value in (chosen | named).items()])

    results: dict[str, Any] = {"straight": train(config("straight", "parallelism=single"))}
    four = {
        "stopped": partial(stopping, config("r"), 3, 1),
        "straight4": lambda world: train(config("straight4")),
    }
    results["four"] = ranks.run(4, four, folder / "four")
    damaged = list_checkpoints(folder / "r/checkpoints")
    results["after four"] = [p.name for p in damaged]
    # the newest is damaged before 2 ranks go on: one byte of a tensor
    file = max((damaged[-1] / "model").iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    two = {
        "resumed": partial(stopping, config("r"), 5, 0),
        "other optimizer": partial(
            expecting,
            UserError,
            config("a", "optimizer=adam", f"checkpoint.path={folder / 'straight'}"),
        ),
        # on two ranks a piece of its weights has the shape of the whole there
        "larger model": partial(
            expecting,
            UserError,
            config(
                "l",
                "model.intermediate_size=352",
                f"checkpoint.path={folder / 'straight'}",
                "checkpoint.load=weights",
            ),
        ),
        "weights": lambda world: train(
            config(
                "w",
                "optimizer=adam",
                f"checkpoint.path={folder / 'straight'}",
                "checkpoint.load=weights",
                "steps=2",
            )
        ),
        "continued": lambda world: train(config("c", f"checkpoint.path={folder / 'straight'}", "steps=9")),
        "fewer steps": partial(
            expecting, UserError, config("s", f"checkpoint.path={folder / 'straight'}", "steps=7")
        ),
        "full disk": partial(full_disk, config("f")),
        "other settings": partial(expecting, UserError, config("f", "optimizer.lr=0.5", "overwrite=false")),
        "not finite": partial(
            expecting, TrainingError, config("n", *DIVERGING, "lr_scheduler.warmup_steps=0")
        ),
    }
    results["two"] = ranks.run(2, two, folder / "two")
    results["three"] = ranks.run(3, {"resumed": partial(stopping, config("r"), 7, 2)}, folder / "three")
    results["one"] = train(config("r", "parallelism=single"))
    return folder, results


def test_a_signal_to_one_rank_stops_all_after_the_step(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, results = shared
    assert ranks.succeeded(results["four"]["stopped"]) == [75] * 4
    assert results["after four"] == ["step_00000002", "step_00000003"]
    assert "stopped by a request to another rank after step 3" in (folder / "r/train.log").read_text()


def test_a_run_goes_on_on_other_numbers_of_ranks(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, results = shared
    assert ranks.succeeded(results["two"]["resumed"]) == [75] * 2
    assert ranks.succeeded(results["three"]["resumed"]) == [75] * 3
    assert results["one"]["val/loss"] == pytest.approx(results["straight"]["val/loss"], rel=1e-3)
    log = (folder / "r/train.log").read_text()
    assert re.search(
        r"warning: step_00000003 cannot be read and is passed over: model/shard.* is damaged", log
    )
    steps = [int(s) for s in re.findall(r"resumed from .*step_(\d+)", log)]
    assert steps == [2, 5, 7]
    assert_near(weights(folder / "r", 8), weights(folder / "straight", 8))
    lines = [json.loads(line) for line in (folder / "r/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "train/loss" in r] == list(range(1, 9))  # rank 0 alone logs


def test_four_ranks_end_where_one_does(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, results = shared
    (summary, *others) = ranks.succeeded(results["four"]["straight4"])
    assert all(other == summary for other in others)
    assert summary["tokens"] == results["straight"]["tokens"]
    assert_near(weights(folder / "straight4", 8), weights(folder / "straight", 8))
    evaluated = [json.loads(line) for line in (folder / "straight4/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in evaluated if "val/loss" in r] == [4, 8]


def test_no_checkpoint_of_several_ranks_has_a_pickle(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = shared
    path = folder / "straight4/checkpoints/step_00000008"
    files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    shards = [
        f"{k}/shard-0000{i}-model-00001-of-00001.safetensors"
        for k in ("model", "optimizer")
        for i in (1, 2, 3, 4)
    ]
    assert files == sorted([*shards, "checksums.json", "evaluation.json", "trainer.json"])
    executed = folder / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (executed,))

    hostile = folder / "hostile"
    shutil.copytree(path, hostile)
    (hostile / "model/.metadata").write_bytes(pickle.dumps(Hostile()))
    assert load_checkpoint(hostile, torch.device("cpu"))[0].keys() == weights(folder / "straight4", 8).keys()
    (hostile / "model/shard-00001-model-00001-of-00001.safetensors").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(Exception, match=r"(?i)header"):
        load_tensors(hostile, "model")
    assert not executed.exists()


def test_the_state_of_another_optimizer_is_refused_but_its_weights_may_be_taken(
    shared: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = shared
    for sentence in ranks.succeeded(results["two"]["other optimizer"]):
        assert "unexpected optimizer state" in sentence or "has no optimizer state" in sentence
        assert "checkpoint.load=weights" in sentence
    ranks.succeeded(results["two"]["weights"])
    assert "begins with the weights of" in (folder / "w/train.log").read_text()
    first = json.loads((folder / "w/metrics.jsonl").read_text().splitlines()[0])
    last = [json.loads(line) for line in (folder / "straight/metrics.jsonl").read_text().splitlines()]
    assert first["step"] == 1
    assert first["train/loss"] < 0.9 * last[0]["train/loss"]
    for sentence in ranks.succeeded(results["two"]["fewer steps"]):
        assert "step_00000008 is of step 8, but steps=7" in sentence
    (summary, _) = ranks.succeeded(results["two"]["continued"])
    assert summary["step"] == 9


def test_weights_of_another_shape_are_refused_where_the_whole_is_as_large_as_a_piece(
    shared: tuple[Path, dict[str, Any]],
) -> None:
    _, results = shared
    for sentence in ranks.succeeded(results["two"]["larger model"]):
        assert "another model: model.layers.0.mlp.down_proj.weight is 64x176 there and 64x352 in" in sentence


def test_a_full_disk_on_one_rank_costs_one_checkpoint(shared: tuple[Path, dict[str, Any]]) -> None:
    folder, results = shared
    ranks.succeeded(results["two"]["full disk"])
    assert "warning: the checkpoint of step 4 was not written: " in (folder / "f/train.log").read_text()
    names = [p.name for p in list_checkpoints(folder / "f/checkpoints")]
    assert names == ["step_00000002", "step_00000006", "step_00000008"]
    assert not list((folder / "f/checkpoints").glob(".partial*"))


def test_a_step_that_is_being_saved_is_not_saved_again_when_a_signal_comes(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def save_checkpoint(folder: Path, step: int, *arguments: Any, **settings: Any) -> Path:
        written.append(step)
        return checkpoint.save_checkpoint(folder, step, *arguments, **settings)

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    config = compose([*tiny, "optimizer=adam", f"output_dir={tmp_path}", "run_name=r"])
    assert stopping(config, 4, 0, World(torch.device("cpu"))) == 75
    assert written == [2, 4]


def test_where_no_checkpoint_can_be_read_none_is_replaced(tiny: list[str], tmp_path: Path) -> None:
    config = compose([*tiny, "optimizer=adam", f"output_dir={tmp_path}", "run_name=r"])
    assert stopping(config, 4, 0, World(torch.device("cpu"))) == 75
    for path in list_checkpoints(tmp_path / "r/checkpoints"):
        (path / "checksums.json").unlink()
    assert "no checkpoint in" in expecting(UserError, config, World(torch.device("cpu")))
    assert len(list_checkpoints(tmp_path / "r/checkpoints")) == 2


def test_what_rank_0_refuses_all_refuse(shared: tuple[Path, dict[str, Any]]) -> None:
    _, results = shared
    first, second = ranks.succeeded(results["two"]["other settings"])
    assert first == second
    assert "holds a run with other settings (optimizer.lr" in first
    for sentence in ranks.succeeded(results["two"]["not finite"]):
        assert "stopped before the update" in sentence


def launch(arguments: list[str], folder: Path, size: int, **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
            *settings.pop("options", []), "-m", "rsotrain", *arguments,
        ],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings,
    )  # fmt: skip


@pytest.mark.long
def test_when_a_rank_dies_the_others_say_so_and_torchrun_goes_on(tiny: list[str], tmp_path: Path) -> None:
    keep = [o for o in tiny if not o.startswith(("steps=", "save_every="))]
    command = [*keep, "steps=400", "save_every=10", "parallelism=fsdp", "run_name=r"]
    process = launch(command, tmp_path, 2, options=["--max-restarts=1"])
    checkpoints = tmp_path / "outputs/r/checkpoints"
    deadline = time.monotonic() + 120
    while not list_checkpoints(checkpoints) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdigit() and f"PPid:\t{process.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    ]
    os.kill(max(workers), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "another rank has ended or cannot be reached" in output
    assert "Traceback" not in output.split("another rank has ended")[0]
    assert "resumed from" in output
    assert json.loads((tmp_path / "outputs/r/summary.json").read_text())["step"] == 400


def test_a_mistake_is_said_by_one_process_and_in_torchruns_report(tiny: list[str], tmp_path: Path) -> None:
    process = launch([*tiny, "parallelism=fsdp", "parallelism.world_size=3"], tmp_path, 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    of_processes, _, report = output.partition("=" * 40)
    for said in (of_processes, report):
        assert said.count("rsotrain: parallelism.world_size=3, but 2 processes were started") == 1


@pytest.mark.long
def test_ranks_end_in_good_order_every_time(tiny: list[str], tmp_path: Path) -> None:
    for number in range(8):
        command = [*tiny, "parallelism=fsdp", "eval_every=2", f"run_name=r{number}"]
        process = launch(command, tmp_path, 2)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert not re.search(r"SIG(ABRT|SEGV)|terminate called|Traceback|FATAL", output), output
        assert json.loads((tmp_path / f"outputs/r{number}/run.json").read_text())["state"] == "finished"
