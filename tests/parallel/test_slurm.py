"""SLURM's variables become torchrun's."""

import subprocess
from typing import Any

import pytest

from rsotrain.errors import UserError
from rsotrain.parallel.slurm import FIRST_PORT, NUM_PORTS, adopt_slurm_step

# What SLURM 22.05 sets for the second of two tasks that srun starts in a job.
STEP = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
}  # fmt: skip
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def adopted(**changes: str) -> dict[str, str]:
    environment = STEP | changes
    adopt_slurm_step(environment)
    return environment


def test_a_task_of_a_step_knows_its_rank() -> None:
    environment = adopted()
    assert [environment[name] for name in NAMES] == ["1", "1", "2", "2", "127.0.0.1"]
    assert FIRST_PORT <= int(environment["MASTER_PORT"]) < FIRST_PORT + NUM_PORTS
    # every task of the step finds the same port, another step another one
    assert adopted(SLURM_PROCID="0")["MASTER_PORT"] == environment["MASTER_PORT"]
    assert adopted(SLURM_STEP_ID="1")["MASTER_PORT"] != environment["MASTER_PORT"]
    assert adopted(SLURM_JOB_ID="42")["MASTER_PORT"] != environment["MASTER_PORT"]


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def hostnames(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "hostnames", "n[3-6]"]
        return subprocess.CompletedProcess(command, 0, stdout="n3\nn4\nn5\nn6\n")

    monkeypatch.setattr(subprocess, "run", hostnames)
    uneven = {
        "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_STEP_NODELIST": "n[3-6]",
    }  # fmt: skip
    last = adopted(**uneven, SLURM_PROCID="6", SLURM_LOCALID="0", SLURM_NODEID="3")
    assert [last[name] for name in NAMES] == ["6", "0", "7", "1", "n3"]
    assert adopted(**uneven, SLURM_PROCID="5", SLURM_NODEID="2")["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    "changes", [{"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "4"}], ids=["one task", "under torchrun"]
)
def test_other_processes_are_left_alone(changes: dict[str, str]) -> None:
    assert adopted(**changes) == STEP | changes


def test_a_batch_script_is_no_step() -> None:
    batch = {key: value for key, value in STEP.items() if "STEP" not in key} | {"SLURM_NTASKS": "2"}
    before = dict(batch)
    adopt_slurm_step(batch)
    assert batch == before


def test_what_the_user_has_set_wins() -> None:
    environment = adopted(MASTER_ADDR="head", MASTER_PORT="7")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "7")


def test_a_first_node_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"scontrol show hostnames n\[1-2\].* set MASTER_ADDR"):
        adopted(SLURM_STEP_NUM_NODES="2", SLURM_STEP_NODELIST="n[1-2]")
