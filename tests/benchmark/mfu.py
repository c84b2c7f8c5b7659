"""Model FLOPs utilisation of the training step, as mode=benchmark measures it.

    python tests/benchmark/mfu.py [--optimizers adam rso] [--model llama_130m] [--precision bf16_mixed]

Each optimizer is one run of the command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import ROOT, Figure, report

BAR = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_130m")
    parser.add_argument("--precision", default="bf16_mixed", choices=["bf16", "bf16_mixed"])
    parser.add_argument("--optimizers", nargs="+", default=["adam", "rso"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    figures = []
    for optimizer in arguments.optimizers:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "rsotrain", "mode=benchmark", f"model={arguments.model}",
                f"optimizer={optimizer}", f"precision={arguments.precision}", "batch_size=8", "seq_len=256",
                "model.vocab_size=32000", f"output_dir={folder}", "run_name=r", "logger=jsonl",
                f"benchmark.steps={arguments.steps}",
            ]  # fmt: skip
            subprocess.run(command, check=True, cwd=folder, env=environment)
            result = json.loads((Path(folder) / "benchmarks" / "r.json").read_text())
        detail = (
            f"step {result['throughput/step_seconds']:.2f} s,"
            f" {result['throughput/tokens_per_second']:.0f} tokens/s,"
            f" of {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s"
        )
        figures.append(Figure("MFU", optimizer, result["throughput/mfu"], BAR, detail=detail))
    conditions = (
        f"{arguments.model}, {arguments.precision}, 8 x 256 tokens, vocabulary 32000,"
        f" {arguments.threads} threads: of the measured rate of a bf16 product of 1024 x 1024"
    )
    report("mfu", conditions, figures)


if __name__ == "__main__":
    main()
