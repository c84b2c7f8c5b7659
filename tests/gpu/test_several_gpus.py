"""What several GPUs have to show: one process's numbers, ends and restarts that are clean, speed that scales.

``make test-gpus`` runs these and writes a report; without GPUs it takes two processes on the CPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command import ROOT
from helpers.gpu_settings import HERE, needs_gpus

pytestmark = [pytest.mark.gpu, needs_gpus]

Note = Callable[[str, object], None]
# Sizes that eight ranks do not divide: pieces are uneven, and some are empty
SMALL = (
    "model=llama_tiny", "model.hidden_size=36", "model.num_attention_heads=2", "tokenizer.vocab_size=401",
    "seq_len=64", "batch_size=16", "micro_batch_size=1", "logger=jsonl", "evaluation.samples=false",
    "log_every=1", "evaluation.max_tokens=1000", "compile=false",
)  # fmt: skip
TIMEOUT = 240
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}


def launcher(ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else [])]


def command(ranks: int, *overrides: str, program: tuple[str, ...] = ("-m", "rsotrain")) -> list[str]:
    return [*launcher(ranks), *program, *SMALL, f"device={HERE.device}", *overrides]


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "ddp"])
@pytest.mark.parametrize("optimizer", ["adam", "rso", "galore"])
def test_it_is_one_process(optimizer: str, strategy: str, tmp_path: Path, record_property: Note) -> None:
    """In float32; sums over ranks are in another order."""
    gap = [] if optimizer == "adam" else ["optimizer.update_proj_gap=3"]
    own = [f"optimizer={optimizer}", "precision=fp32", "steps=4", f"output_dir={tmp_path}", *gap]
    shards = [f"parallelism.shard_size={HERE.ranks // 2}"] if strategy == "hsdp" else []
    done = [
        ended(command(1, *own, "run_name=one")),
        ended(command(HERE.ranks, *own, f"parallelism={strategy}", *shards, "run_name=several")),
    ]
    assert [one.returncode for one in done] == [0, 0], done[-1].stderr[-2000:]
    one, several = losses(tmp_path, "one"), losses(tmp_path, "several")
    found = max(abs(a - b) / b for a, b in zip(several, one, strict=True))
    record_property("loss", found)
    assert found < 2e-4


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(tmp_path: Path, record_property: Note) -> None:
    given = [
        "optimizer=rso", "steps=40", "save_every=4", "parallelism=fsdp", "parallelism.timeout_seconds=30",
        "run_name=killed", f"output_dir={tmp_path}",
    ]  # fmt: skip
    with (tmp_path / "log.txt").open("w") as log:
        started = subprocess.Popen(
            command(HERE.ranks, *given), env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not list(tmp_path.glob("killed/checkpoints/step_*")) and time.monotonic() < deadline:
                time.sleep(0.05)
            workers = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True, check=True
            )
            os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
            begin = time.monotonic()
            status = started.wait(TIMEOUT)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
    record_property("seconds to end", time.monotonic() - begin)
    assert status != 0
    again = ended(command(HERE.ranks, *given))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resum" in again.stdout + again.stderr or "goes on" in again.stdout + again.stderr


SHORT_OF_MEMORY = """
import os, torch
from rsotrain.training.trainer import Trainer
step = Trainer.train_step
def train_step(self, *given):
    if self.step == 2 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return step(self, *given)
Trainer.train_step = train_step
from rsotrain.cli.entry import main
main()
"""


def test_out_of_memory_on_one_rank_ends_all(tmp_path: Path, record_property: Note) -> None:
    program = tmp_path / "short_of_memory.py"
    program.write_text(SHORT_OF_MEMORY)
    begin = time.monotonic()
    given = ["optimizer=adam", "steps=8", "parallelism=fsdp", "run_name=short", f"output_dir={tmp_path}"]
    program_of = (str(program),)
    done = ended(command(HERE.ranks, *given, "parallelism.timeout_seconds=30", program=program_of))
    record_property("seconds to end", time.monotonic() - begin)
    assert done.returncode != 0
    assert "out of memory" in done.stderr, done.stderr[-2000:]


def test_tokens_per_second_scale(tmp_path: Path, record_property: Note) -> None:
    """As many tokens a rank; links as fast as a node's should keep 0.7 of each GPU's rate."""
    sizes = [1, HERE.ranks] if HERE.dry else [n for n in (1, 2, 4, 8) if n <= HERE.ranks]
    rates = {}
    big = ["model=llama_tiny"] if HERE.dry else ["model=llama_350m", "seq_len=1024", "micro_batch_size=16"]
    for ranks in sizes:
        batch = f"batch_size={(4 if HERE.dry else 16) * ranks}"
        strategy = ["parallelism=fsdp"] if ranks > 1 else []
        done = ended(
            [
                *launcher(ranks), "-m", "rsotrain", "mode=benchmark", "optimizer=rso", "seq_len=64", *big,
                batch, *strategy, "benchmark.steps=3", f"run_name=ranks{ranks}", f"output_dir={tmp_path}",
                f"device={HERE.device}", "tokenizer.vocab_size=401",
            ]
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads((tmp_path / "benchmarks" / f"ranks{ranks}.json").read_text())
        rates[ranks] = result["throughput/tokens_per_second"]
        record_property(f"tokens/s of {ranks}", rates[ranks])
    if not HERE.dry:
        assert all(rate > 0.7 * ranks * rates[1] for ranks, rate in rates.items())
