"""How long until the first training step has ended, and what importing takes.

    python tests/benchmark/startup.py [--model llama_60m]

The first run fills the cache with the tokenizer and the tokens; then the time from starting the command to
the first line of metrics.jsonl is taken, median of --rounds. The run is ended there.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import ROOT, Figure, report


def first_step_seconds(folder: Path, model: str, optimizer: str, number: int) -> float:
    command = [
        sys.executable, "-m", "rsotrain", f"model={model}", f"optimizer={optimizer}", "logger=jsonl",
        f"output_dir={folder}", f"cache_dir={folder / 'cache'}", f"run_name={number}",
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    metrics = folder / str(number) / "metrics.jsonl"
    try:
        while not (metrics.exists() and "\n" in metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"the command ended with status {process.returncode}: {' '.join(command)}")
            time.sleep(0.01)
        return time.perf_counter() - start
    finally:
        process.kill()
        process.wait()


def import_seconds(module: str, rounds: int) -> float:
    """Median of importing ``module`` in a process of its own, the interpreter's start not counted."""
    program = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return statistics.median(
        float(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True))
        for _ in range(rounds)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--optimizers", nargs="+", default=["rso_pca", "galore"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first_step_seconds(folder, "llama_tiny", "adam", 0)  # fills the cache
        number = 0
        for optimizer in arguments.optimizers:
            seconds = []
            for _ in range(arguments.rounds):
                number += 1
                seconds.append(first_step_seconds(folder, arguments.model, optimizer, number))
            of = f"{arguments.model} optimizer={optimizer}"
            median = statistics.median(seconds)
            figures.append(Figure("first step, warm cache", of, median, 10.0, False, " s"))
    figures.append(Figure("import", "rsotrain", import_seconds("rsotrain", 5), 0.2, False, " s"))
    of_cli = import_seconds("rsotrain.cli.entry", 3)
    figures.append(Figure("import, as for --help", "rsotrain.cli.entry", of_cli, unit=" s"))
    report("startup", "from the start of the command", figures)


if __name__ == "__main__":
    main()
