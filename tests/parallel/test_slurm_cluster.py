"""On a real SLURM of one machine (make test-slurm): arrays, requeues, preemption, submitit, sweeps."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import ROOT
from helpers.fake_wandb_server import FakeWandbServer
from helpers.slurm_lab import slurm_lab

pytestmark = pytest.mark.skipif("RSOTRAIN_SLURM_LAB" not in os.environ, reason="make test-slurm runs it")

SCRIPT = ROOT / "sweeps/slurm_array.sbatch"
OPTIMIZERS = ("adam", "galore", "rso", "apollo", "frugal", "muon")
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of those who submit."""
    with slurm_lab(tmp_path_factory) as environment:
        yield environment


def call(command: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=550, check=False
    )


def submit(
    folder: Path, environment: dict[str, str], lines: list[str], tiny: list[str], *options: str
) -> subprocess.Popen[str]:
    """sbatch of the array script for a list of ``lines``; ends with the job, with its worst status."""
    (folder / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    array = [] if any(o.startswith("--array") for o in options) else [f"--array=0-{len(lines) - 1}"]
    command = ["sbatch", "--wait", "--parsable", *array, *options, str(SCRIPT), "list.txt", *tiny]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def summaries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))]


def steps_of(run: Path) -> list[int]:
    """Of its records, in order; those of training and of an evaluation at one step count once."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["step"] for line in lines))


def without(overrides: list[str], *keys: str) -> list[str]:
    return [o for o in overrides if o.split("=")[0] not in keys]


def test_an_array_survives_a_requeue_and_a_preemption(
    cluster: dict[str, str], tmp_path: Path, tiny: list[str]
) -> None:
    lines = [f"seed={seed} run_name=r{seed}" for seed in range(4)]
    lines[1] += " steps=400 logger=jsonl"
    lines[2] += " steps=400 logger=wandb"
    lines[3] += " logger=jsonl steps=6"
    lines[0] += " logger=jsonl steps=6"
    job = submit(tmp_path, cluster, lines, without(tiny, "steps", "save_every", "logger"))
    assert job.stdout is not None
    number = job.stdout.readline().strip()
    runs = [tmp_path / f"outputs/r{i}" for i in range(4)]

    def trains(run: Path) -> bool:
        return (run / "metrics.jsonl").exists() and len(steps_of(run)) > 5

    until(lambda: trains(runs[1]))
    subprocess.run(["scontrol", "requeue", f"{number}_1"], env=cluster, check=True)
    until(lambda: trains(runs[2]))
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{number}_2"], env=cluster, check=True)
    assert job.wait(400) == 0
    logs = [(tmp_path / f"rsotrain_{number}_{i}.out").read_text() for i in range(4)]
    assert "stopped by SIGTERM" in logs[1]
    assert "stopped by SIGUSR1" in logs[2]
    assert "task 2 is queued again" in logs[2]
    for i, steps in enumerate((6, 400, 400, 6)):
        summary = json.loads((runs[i] / "summary.json").read_text())
        assert (summary["finished"], summary["step"]) == (True, steps)
        assert steps_of(runs[i])[-1] == steps
        assert len(steps_of(runs[i])) == steps
        assert logs[i].count(f"task {i}, start ") == 1 + (i in (1, 2))
        assert logs[i].count("resumed from") == (i in (1, 2))
    folders = list((runs[2] / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1  # W&B's id
    # the losses of the one that was stopped are those of one that was not
    straight = ["seed=1", "steps=400", "run_name=straight", *without(tiny, "steps", "save_every")]
    assert call([sys.executable, "-m", "rsotrain", *straight], tmp_path, cluster).returncode == 0
    whole = json.loads((tmp_path / "outputs/straight/summary.json").read_text())
    assert json.loads((runs[1] / "summary.json").read_text())["val/loss"] == whole["val/loss"]


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_signal_to_one_task_restarts_that_one_alone(
    cluster: dict[str, str], tmp_path: Path, tiny: list[str], place: int
) -> None:
    other, cancelled = (task for task in range(3) if task != place)
    lines = [f"run_name=r{task} steps=500" for task in range(3)]
    job = submit(tmp_path, cluster, lines, without(tiny, "steps", "save_every"))
    assert job.stdout is not None
    number = job.stdout.readline().strip()
    runs = [tmp_path / f"outputs/r{task}" for task in range(3)]
    until(lambda: all((run / "metrics.jsonl").exists() and len(steps_of(run)) > 5 for run in runs))
    subprocess.run(["scancel", f"{number}_{cancelled}"], env=cluster, check=True)
    until(lambda: not state_of(f"{number}_{cancelled}", cluster).startswith(("RUNNING", "COMPLETING")))
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{number}_{place}"], env=cluster, check=True)
    job.wait(400)
    logs = [(tmp_path / f"rsotrain_{number}_{task}.out").read_text() for task in range(3)]
    starts = [log.count(f"task {task}, start ") for task, log in enumerate(logs)]
    assert starts == [1 + (task == place) for task in range(3)]
    assert f"task {place} is queued again" in logs[place]
    assert state_of(f"{number}_{cancelled}", cluster) == "CANCELLED"
    for task in (place, other):
        assert json.loads((runs[task] / "summary.json").read_text())["step"] == 500


def state_of(task: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", "--array", f"--jobs={task}", "--format=%T"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_mistakes_cost_one_sentence_and_no_second_start(
    cluster: dict[str, str], tmp_path: Path, tiny: list[str]
) -> None:
    beyond = submit(tmp_path, cluster, ["seed=0"], tiny, "--array=3")
    several = submit(tmp_path, cluster, ["seed=0"], tiny, "--ntasks=2")
    for job, sentence in (
        (beyond, "list.txt holds 1 configurations, so there is no number 3; use --array=0-0"),
        (several, "parallelism=single is for one process, but 2 were started"),
    ):
        out, _ = job.communicate(timeout=300)
        assert job.returncode == 2
        (log,) = tmp_path.glob(f"rsotrain_{out.strip()}_*.out")
        assert sentence in log.read_text()
        assert "queued again" not in log.read_text()
    assert not (tmp_path / "outputs").exists()


def test_two_tasks_shard_one_run_and_survive_a_preemption(
    cluster: dict[str, str], tmp_path: Path, tiny: list[str]
) -> None:
    overrides = [*without(tiny, "steps", "save_every"), "steps=200"]
    job = submit(tmp_path, cluster, ["run_name=sharded"], [*overrides, "parallelism=fsdp"], "--ntasks=2")
    assert job.stdout is not None
    number = job.stdout.readline().strip()
    run = tmp_path / "outputs/sharded"
    until(lambda: (run / "metrics.jsonl").exists() and len(steps_of(run)) > 5)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{number}_0"], env=cluster, check=True)
    assert job.wait(400) == 0
    log = (tmp_path / f"rsotrain_{number}_0.out").read_text()
    assert log.count("stopped by SIGUSR1") == log.count("resumed from") == 1  # rank 0 speaks
    assert steps_of(run) == list(range(1, 201))
    single = [sys.executable, "-m", "rsotrain", *overrides, "run_name=single"]
    assert call(single, tmp_path, cluster).returncode == 0
    sharded, alone = (
        json.loads((run.parent / name / "summary.json").read_text()) for name in ("sharded", "single")
    )
    assert sharded["finished"]
    assert sharded["tokens"] == alone["tokens"]
    # Sums over ranks round in another order, 1e-7 a step, and 200 steps of Adam spread that.
    assert sharded["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-3)


def test_submitit_starts_a_preempted_member_again(
    cluster: dict[str, str], tmp_path: Path, tiny: list[str]
) -> None:
    command = [
        sys.executable, "-m", "rsotrain", "-m", "hydra/launcher=submitit_slurm", "seed=0,1", "steps=800",
        "hydra.launcher.timeout_min=20", "hydra.launcher.max_num_timeout=2",
        *without(tiny, "steps", "save_every"),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, env=cluster, stdout=subprocess.PIPE, text=True)

    def second() -> list[Path]:
        files = tmp_path.glob("outputs/*seed1*/metrics.jsonl")
        return [file.parent for file in files if len(steps_of(file.parent)) > 5]

    until(second)
    squeue = ["squeue", "--noheader", "--array", "--name=rsotrain", "--format=%i"]
    jobs = subprocess.run(squeue, env=cluster, capture_output=True, text=True, check=True).stdout.split()
    (job,) = (job for job in jobs if job.endswith("_1"))
    subprocess.run(["scancel", "--signal=USR2", job], env=cluster, check=True)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert "Comparison" in out
    assert [(s["finished"], s["step"]) for s in summaries(tmp_path / "outputs")] == [(True, 800)] * 2
    (run,) = second()
    assert steps_of(run) == list(range(1, 801))
    assert "resumed from" in (run / "train.log").read_text()


@pytest.mark.long
def test_four_ways_to_sweep_give_the_same_losses(
    cluster: dict[str, str], tmp_path: Path, tiny: list[str]
) -> None:
    overrides = without(tiny, "save_every", "eval_every", "log_every")
    both = [f"optimizer={','.join(OPTIMIZERS)}", f"seed={','.join(map(str, SEEDS))}"]
    rsotrain = [sys.executable, "-m", "rsotrain"]
    done = call([*rsotrain, "-m", *both, *overrides, "output_dir=multirun"], tmp_path, cluster)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("Comparison") :]
    assert all(re.search(rf"│ {optimizer}.*2 runs", table) for optimizer in OPTIMIZERS)

    # submitit's local launcher starts all members of a batch at once
    few = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20", "hydra.sweeper.max_batch_size=4"]
    done = call([*rsotrain, "-m", *few, *both, *overrides, "output_dir=submitit"], tmp_path, cluster)
    assert done.returncode == 0, done.stderr

    lines = [f"optimizer={optimizer} seed={seed}" for optimizer in OPTIMIZERS for seed in SEEDS]
    job = submit(tmp_path, cluster, lines, [*overrides, "output_dir=array"])
    job.communicate(timeout=500)
    assert job.returncode == 0

    server = FakeWandbServer()
    sweep = yaml.safe_load((ROOT / "sweeps/optimizers.yaml").read_text())
    fixed = dict(o.split("=", 1) for o in [*overrides, "output_dir=agent"])
    sweep["parameters"] = {
        **{key: {"value": yaml.safe_load(value)} for key, value in fixed.items()},
        "optimizer": {"values": list(OPTIMIZERS)},
        "seed": {"values": list(SEEDS)},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path)}
    environment = {k: v for k, v in cluster.items() if k != "WANDB_MODE"} | online
    wandb = [sys.executable, "-m", "wandb"]
    try:
        created = call([*wandb, "sweep", "sweep.yaml"], tmp_path, environment)
        found = re.search(r"wandb agent (\S+)", created.stderr)
        assert found is not None, created.stderr
        done = call([*wandb, "agent", found[1]], tmp_path, environment)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        server.close()

    losses = {}
    for way in ("multirun", "submitit", "array", "agent"):
        configs = {
            path.parent: yaml.safe_load(path.read_text()) for path in tmp_path.glob(f"{way}/*/config.yaml")
        }
        losses[way] = {
            (config["optimizer"]["name"], config["seed"]): json.loads((run / "summary.json").read_text())[
                "val/loss"
            ]
            for run, config in configs.items()
        }
        assert len(configs) == len(losses[way]) == len(OPTIMIZERS) * len(SEEDS)
    assert losses["multirun"] == losses["submitit"] == losses["array"] == losses["agent"]
    assert len(set(losses["multirun"].values())) == len(OPTIMIZERS) * len(SEEDS)
    if shutil.which("squeue"):
        left = subprocess.run(
            ["squeue", "--noheader"], env=cluster, capture_output=True, text=True, check=True
        )
        assert left.stdout.count(" PD ") == 0
