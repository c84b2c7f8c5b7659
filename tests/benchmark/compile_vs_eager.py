"""compile=true against eager for each optimizer: tokens/s of alternating steps after warm-up.

    python tests/benchmark/compile_vs_eager.py [--optimizers adam rso] [--model llama_20m]

The compiled trainer's warm-up compiles; graphs are shared by the optimizers whose blocks are alike.
"""

import argparse
import gc

from bench import ROOT, Figure, alternate, build_trainer, median_seconds, report, use_threads

OPTIMIZERS = sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_20m")
    parser.add_argument("--precision", default="bf16_mixed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    shared = [
        f"model={arguments.model}", f"precision={arguments.precision}", f"seq_len={arguments.seq_len}",
        f"batch_size={arguments.batch_size}",
    ]  # fmt: skip
    figures = []
    for optimizer in arguments.optimizers:
        steps = {
            name: build_trainer(*shared, f"optimizer={optimizer}", f"compile={name}").train_step
            for name in ("false", "true")
        }
        laps = alternate(steps, arguments.rounds, warmup=3)
        eager, compiled = (median_seconds(laps[name]) for name in ("false", "true"))
        detail = f"eager {eager:.3f} s, compiled {compiled:.3f} s"
        figures.append(Figure("tokens/s of eager's", optimizer, eager / compiled, 1.0, detail=detail))
        print(f"{optimizer}: {figures[-1].value:.3f}", flush=True)
        del steps
        gc.collect()
    conditions = (
        f"{arguments.model}, {arguments.precision}, {arguments.batch_size} x {arguments.seq_len} tokens,"
        f" {arguments.threads} threads: tokens/s of compile=true, of eager"
    )
    report("compile_vs_eager", conditions, figures)


if __name__ == "__main__":
    main()
