"""What a real SLURM of three nodes tells the tasks of its steps (make test-slurm)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import ROOT
from helpers.slurm_lab import slurm_lab

from rsotrain.parallel.slurm import hostnames

pytestmark = pytest.mark.skipif("RSOTRAIN_SLURM_LAB" not in os.environ, reason="make test-slurm runs it")

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TASK = f"""
import json, os
from rsotrain.errors import UserError
from rsotrain.parallel.slurm import adopt_slurm_step
os.environ["PATH"] = ""  # a container has no scontrol
try:
    adopt_slurm_step()
    said = {{name: os.environ.get(name) for name in {NAMES!r}}}
except UserError as error:
    said = {{"refused": str(error)}}
node, rank = os.environ["SLURMD_NODENAME"], os.environ["SLURM_PROCID"]
with open(f"{{os.environ['OUT']}}/{{rank}}.json", "w") as file:
    json.dump(said | {{"node": node, "rank": int(rank)}}, file)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_lab(tmp_path_factory, nodes=3) as environment:
        yield environment


def step(command: str, cluster: dict[str, str], folder: Path, *options: str) -> list[dict[str, str]]:
    """What each task of the step knows, by rank. ``TASK`` in the command is the program."""
    (folder / "task.py").write_text(TASK)
    program = f"{sys.executable} {folder}/task.py"
    script = folder / "job.sh"
    lines = ["#!/bin/bash", *options, f"cd {folder}", command.replace("TASK", program)]
    script.write_text("\n".join(lines) + "\n")
    own = {"OUT": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={folder}/log", str(script)],
        env=cluster | own, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    tasks = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(tasks, key=lambda task: task["rank"])


def check_ranks(tasks: list[dict[str, str]], on_nodes: list[int]) -> None:
    """So many tasks on each node, which all meet where rank 0 is."""
    size = sum(on_nodes)
    assert [task["RANK"] for task in tasks] == [str(rank) for rank in range(size)]
    assert {task["WORLD_SIZE"] for task in tasks} == {str(size)}
    assert {task["MASTER_ADDR"] for task in tasks} == {tasks[0]["node"]}
    assert len({task["MASTER_PORT"] for task in tasks}) == 1
    for node in {task["node"] for task in tasks}:
        there = [task for task in tasks if task["node"] == node]
        assert sorted(int(task["LOCAL_RANK"]) for task in there) == list(range(len(there)))
        assert {task["LOCAL_WORLD_SIZE"] for task in there} == {str(len(there))}
    assert sorted(len([t for t in tasks if t["node"] == n]) for n in {t["node"] for t in tasks}) == on_nodes


ALL_NODES = ("#SBATCH --nodes=3 --ntasks=12",)


@pytest.mark.parametrize(
    ("command", "on_nodes"),
    [
        ("srun --nodes=3 --ntasks=7 TASK", [2, 2, 3]),
        ("srun --nodes=2 --ntasks=4 --distribution=cyclic TASK", [2, 2]),
        ("srun -w n1 -N1 -n2 --exact TASK : -w n2 -N1 -n3 --exact TASK", [2, 3]),  # a heterogeneous step
    ],
    ids=["uneven", "cyclic", "components"],
)
def test_the_tasks_of_a_step_know_their_ranks(
    command: str, on_nodes: list[int], cluster: dict[str, str], tmp_path: Path
) -> None:
    check_ranks(step(command, cluster, tmp_path, *ALL_NODES), on_nodes)


def test_the_tasks_of_a_heterogeneous_job_know_their_ranks(cluster: dict[str, str], tmp_path: Path) -> None:
    components = ("#SBATCH --ntasks=2 --nodes=1", "#SBATCH hetjob", "#SBATCH --ntasks=3 --nodes=1")
    check_ranks(step("srun --het-group=0,1 TASK", cluster, tmp_path, *components), [2, 3])


@pytest.mark.parametrize(
    "command",
    [
        "printf 'n3\\nn1\\nn3\\nn2\\n' >hosts; SLURM_HOSTFILE=hosts srun -n4 --distribution=arbitrary TASK",
        "srun -w n2 -N1 -n2 --exact TASK : -w n1 -N1 -n2 --exact TASK",
    ],
    ids=["hostfile", "components in another order"],
)
def test_a_first_task_on_another_node_is_refused_unless_the_user_says_where(
    command: str, cluster: dict[str, str], tmp_path: Path
) -> None:
    refused, told = tmp_path / "refused", tmp_path / "told"
    refused.mkdir(), told.mkdir()
    tasks = step(command, cluster, refused, *ALL_NODES)
    assert len(tasks) == 4
    assert all("set MASTER_ADDR to the node of the first task" in task["refused"] for task in tasks)
    first = tasks[0]["node"]
    tasks = step(f"export MASTER_ADDR={first}; {command}", cluster, told, *ALL_NODES)
    assert [task["RANK"] for task in tasks] == ["0", "1", "2", "3"]
    assert {task["MASTER_ADDR"] for task in tasks} == {tasks[0]["node"]}


def test_lists_of_nodes_are_read_as_scontrol_does(cluster: dict[str, str]) -> None:
    for coded in (
        "n[3-6]",
        "gpu-a,gpu-b",
        "n[001-003,010]",
        "n[9-11]",
        "r[1-2]n[1-2]",
        "a[1-2],b7,c[08-10]",
    ):
        done = subprocess.run(
            ["scontrol", "show", "hostnames", coded], env=cluster, capture_output=True, text=True, check=True
        )
        assert list(hostnames(coded)) == done.stdout.split(), coded
