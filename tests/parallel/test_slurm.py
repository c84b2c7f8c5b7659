"""SLURM's variables become torchrun's."""

import pytest

from rsotrain.errors import UserError
from rsotrain.parallel.slurm import FIRST_PORT, NUM_PORTS, adopt_slurm_step, hostnames

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


UNEVEN = {
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n[3-6]",
}  # fmt: skip


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # a container has no scontrol
    last = adopted(**UNEVEN, SLURM_PROCID="6", SLURM_LOCALID="0", SLURM_NODEID="3", SLURMD_NODENAME="n6")
    assert [last[name] for name in NAMES] == ["6", "0", "7", "1", "n3"]
    assert adopted(**UNEVEN, SLURM_PROCID="5", SLURM_NODEID="2")["LOCAL_WORLD_SIZE"] == "2"
    # what does not say how many there are on each node: as many on all
    assert adopted(**UNEVEN | {"SLURM_STEP_TASKS_PER_NODE": ""}, SLURM_LOCALID="0")["LOCAL_WORLD_SIZE"] == "1"


# As `scontrol show hostnames` of SLURM 22.05 answers.
@pytest.mark.parametrize(
    ("coded", "names"),
    [
        ("n1", "n1"),
        ("n[3-6]", "n3 n4 n5 n6"),
        ("gpu-a,gpu-b", "gpu-a gpu-b"),
        ("n[001-003,010]", "n001 n002 n003 n010"),
        ("n[9-11]", "n9 n10 n11"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
        ("a[1-2],b7,c[08-10]", "a1 a2 b7 c08 c09 c10"),
        ("", ""),
    ],
)
def test_lists_of_nodes(coded: str, names: str) -> None:
    assert list(hostnames(coded)) == names.split()


@pytest.mark.parametrize(
    "changes",
    [{"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {"WORLD_SIZE": "4"}],
    ids=["one task", "under torchrun"],
)
def test_other_processes_are_left_alone(changes: dict[str, str]) -> None:
    assert adopted(**changes) == STEP | changes


def test_a_batch_script_is_no_step() -> None:
    batch = {key: value for key, value in STEP.items() if "STEP" not in key} | {"SLURM_NTASKS": "2"}
    before = dict(batch)
    adopt_slurm_step(batch)
    assert batch == before


def test_what_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = adopted(MASTER_ADDR="head", MASTER_PORT="7")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "7")
    unknown = {**UNEVEN, "SLURM_STEP_NODELIST": "", "SLURM_DISTRIBUTION": "arbitrary"}
    assert adopted(**unknown, MASTER_ADDR="head")["MASTER_ADDR"] == "head"


@pytest.mark.parametrize("nodes", ["", "n[a-b]"])
def test_a_first_node_that_nobody_knows(nodes: str) -> None:
    with pytest.raises(
        UserError, match=r"SLURM_STEP_NODELIST=.* does not name the first node; set MASTER_ADDR"
    ):
        adopted(SLURM_STEP_NUM_NODES="2", SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_STEP_NODELIST=nodes)


# What SLURM 22.05 sets where the first task is on another node than the first of the list.
@pytest.mark.parametrize(
    "task",
    [
        # srun -w n2 -n2 … : -w n1 -n2 …: the second node of the list is the first one's
        {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n2"},
        {"SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n1"},
        # srun --distribution=arbitrary with a hostfile that begins with n2
        {"SLURM_PROCID": "0", "SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n2"},
        {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_DISTRIBUTION": "arbitrary"},
    ],
)
def test_a_first_task_elsewhere_is_no_rendezvous(task: dict[str, str]) -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "n[1-2]",
    }  # fmt: skip
    with pytest.raises(UserError, match="set MASTER_ADDR to the node of the first task"):
        adopted(**step | task)
    assert adopted(**step | task, MASTER_ADDR="n2")["MASTER_ADDR"] == "n2"


@pytest.mark.parametrize(
    "task",
    [{"SLURM_PROCID": "4"}, {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_LOCALID": "2"}],
)
def test_a_rank_beyond_the_number_of_tasks_is_refused(task: dict[str, str]) -> None:
    with pytest.raises(UserError, match="a heterogeneous step, it seems"):
        adopted(**task)


def test_variables_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="SLURM_PROCID=one in the environment must be a whole number"):
        adopted(SLURM_PROCID="one")
