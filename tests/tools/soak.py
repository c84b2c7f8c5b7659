"""Kill a run of several ranks with SIGKILL, again and again, and see that it ends where it should.

    python tests/tools/soak.py [--kills 20] [--ranks 2] [--steps 400] [--seed 0] [overrides …]

Trains once undisturbed, then once more with a SIGKILL to all processes at each of ``--kills`` random
moments, of which a third are in evaluations and a third while checkpoints are written, and a restart after
each. Exits with status 1 unless the final weights and optimizer states are bitwise the same, of the same
number of ranks, and the histories of losses, too.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from rsotrain.checkpoints.files import KINDS, list_checkpoints, load_tensors

EVAL_EVERY = 6


def start(arguments: argparse.Namespace, folder: Path, name: str) -> subprocess.Popen[bytes]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}", "-m"]
    command = [
        sys.executable, "-m", *(launcher if arguments.ranks > 1 else []), "rsotrain", "model=llama_tiny",
        "optimizer=galore", "optimizer.update_proj_gap=7", "seq_len=64", "batch_size=4",
        f"eval_every={EVAL_EVERY}", "save_every=2", "log_every=1", "evaluation.max_tokens=4000",
        "logger=jsonl", f"parallelism={'fsdp' if arguments.ranks > 1 else 'single'}",
        f"steps={arguments.steps}", f"run_name={name}", f"output_dir={folder}", *arguments.overrides,
    ]  # fmt: skip
    with open(folder / f"{name}.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue  # it has ended
            if int(status.rpartition(")")[2].split()[1]) == pid:
                children += family(int(entry.name))
    return [pid, *children]


def kill(process: subprocess.Popen[bytes]) -> None:
    for pid in family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def newest(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in list_checkpoints(checkpoints)), default=0)


def writing(run: Path) -> bool:
    return bool(list((run / "checkpoints").glob(".partial-*")))


def evaluating(run: Path) -> bool:
    """By the last whole line of the metrics: a training step after which an evaluation is due."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    last = json.loads(lines[-1]) if lines else {"step": 1}
    return last["step"] % EVAL_EVERY == 0 and "val/loss" not in last


def wait_until(process: subprocess.Popen[bytes], run: Path, step: int, moment: random.Random) -> bool:
    """Until ``step`` is saved and a moment of one of three kinds longer; False: the run has ended."""
    while newest(run / "checkpoints") < step:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    kind = moment.choice([writing, evaluating, None])
    while kind is not None and not kind(run):
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(moment.uniform(0.0, 0.5 if kind is None else 0.02))
    return process.poll() is None


def losses(run: Path) -> list[tuple[int, float | None, float | None]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    moment = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"runs in {folder}", flush=True)
    if start(arguments, folder, "undisturbed").wait() != 0:
        sys.exit(f"the undisturbed run failed: see {folder}/undisturbed.txt")
    run = folder / "killed"
    found: Counter[str] = Counter()
    targets = sorted(moment.sample(range(1, arguments.steps - 20), arguments.kills))
    for number, target in enumerate(targets, 1):
        process = start(arguments, folder, "killed")
        if not wait_until(process, run, target, moment):
            sys.exit(f"kill {number}: the run ended by itself: see {folder}/killed.txt")
        kill(process)
        what = " and ".join(kind.__name__ for kind in (writing, evaluating) if kind(run)) or "between"
        found[what] += 1
        print(f"kill {number}: {what}, newest checkpoint {newest(run / 'checkpoints')}", flush=True)
    status = start(arguments, folder, "killed").wait()
    if status != 0:
        sys.exit(f"the last restart failed: see {folder}/killed.txt")
    final = f"checkpoints/step_{arguments.steps:08d}"
    for kind in KINDS:
        a, b = (load_tensors(folder / name / final, kind) for name in ("undisturbed", "killed"))
        differing = sorted(
            k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])
        )
        if differing:
            sys.exit(f"{len(differing)} {kind} tensors differ, {differing[0]} first: see {folder}")
    if losses(folder / "undisturbed") != losses(run):
        sys.exit(f"the histories of losses differ: see {folder}")
    print(
        f"{arguments.kills} kills ({dict(found)}): bitwise the weights, states and losses of a run without"
    )


if __name__ == "__main__":
    main()
