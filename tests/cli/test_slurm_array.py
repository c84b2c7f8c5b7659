"""The array script without a SLURM: its commands are stand-ins that write down how they were called."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import ROOT

SCRIPT = ROOT / "sweeps/slurm_array.sbatch"
NODES = {"SLURM_JOB_ID": "30007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[3-4]"}
# For python: prints the overrides of the list, and as the run says how it was called and does what RUN says.
PYTHON = """#!/usr/bin/env bash
if [ "$2" = rsotrain.sweep_file ]; then exec "$REAL" "$@"; fi
echo "run: $* cpus=${SRUN_CPUS_PER_TASK:-}"
eval "$RUN"
"""
SRUN = """#!/usr/bin/env bash
echo "srun: $*"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "requeued $2"; else printf 'n3\\nn4\\n'; fi
"""


def begin(folder: Path, run: str = "exit 0", task: str = "1", **environment: str) -> subprocess.Popen[str]:
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "list.txt").write_text("seed=0\nseed=1 run_name=\"'a b'\"\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_", "PYTHON"))}
    own = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "REAL": sys.executable, "RUN": run,
        "PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "5", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", SCRIPT, "list.txt", "steps=3"],
        cwd=folder, env=clean | own | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_task_runs_its_line_and_hands_its_status_on(tmp_path: Path) -> None:
    overrides = "seed=1 run_name='a b' steps=3"
    said = f"task 1, start 1: {overrides}\nrun: -m rsotrain {overrides} cpus=\n"
    assert finish(begin(tmp_path)) == (0, said, "")
    status, out, _ = finish(begin(tmp_path, "exit 1"))
    assert (status, "requeued" in out) == (1, False)
    status, out, _ = finish(begin(tmp_path, "exit 75"))
    assert (status, "requeued 5_1\n" in out) == (0, True)
    status, out, err = finish(begin(tmp_path, task="2"))
    assert (status, out) == (2, "")
    assert "there is no number 2" in err


@pytest.mark.parametrize(
    "size",
    [{"SLURM_NTASKS": "8"}, {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}],
    ids=["all", "per node"],
)
def test_several_tasks_are_started_by_srun_with_their_cores(size: dict[str, str], tmp_path: Path) -> None:
    _, out, _ = finish(begin(tmp_path, **size, SLURM_CPUS_PER_TASK="4"))
    assert "srun: --ntasks=8 --kill-on-bad-exit=0 python -m rsotrain seed=1" in out
    assert "cpus=4" in out


def test_torchrun_meets_on_the_first_node(tmp_path: Path) -> None:
    _, out, _ = finish(begin(tmp_path, PROCESSES_PER_NODE="4", SLURM_NTASKS="2", **NODES))
    assert "srun: --ntasks=2 --ntasks-per-node=1 python -m torch.distributed.run" in out
    assert "--nnodes=2 --nproc-per-node=4 " in out
    assert "--rdzv-id=30007 --rdzv-endpoint=n3:20007 " in out
    assert re.search(r"-m rsotrain seed=1 run_name='a b' steps=3 ", out)


@pytest.mark.parametrize(
    ("number", "status", "queued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 75, False)]
)
def test_signals_reach_the_run(number: int, status: int, queued: bool, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    waiting = f"trap 'echo got; exit 75' USR1 TERM; touch {ready}; while :; do sleep 0.05; done"
    process = begin(tmp_path, waiting)
    end = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    ended, out, _ = finish(process)
    assert (ended, "got" in out, "requeued 5_1\n" in out) == (status, True, queued)


def test_the_script_leaves_the_number_of_tasks_to_sbatch() -> None:
    """``--ntasks`` in the script would beat ``--nodes=2 --ntasks-per-node=4`` on the command line."""
    options = re.findall(r"^#SBATCH --(\S+?)(?:=|$)", SCRIPT.read_text(), re.MULTILINE)
    assert {"requeue", "signal", "open-mode"} <= set(options)
    assert not {name for name in options if name.startswith(("ntasks", "nodes", "gpus", "cpus"))}
