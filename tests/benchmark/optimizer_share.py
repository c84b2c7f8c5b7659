"""What each method's optimizer step costs, as a share of forward and backward, refreshes amortised.

    python tests/benchmark/optimizer_share.py [--optimizers adam galore rso] [--model llama_130m]
    python tests/benchmark/optimizer_share.py --optimizers muon --set optimizer.ns_dtype=float32

Each method with the settings of its file, one after the other, in this process: medians of a few steps of the
Trainer by phase. Forward and backward are the median over all methods but RSO, whose are its own. Beside the
optimizer's update its share has the refreshes, divided by update_proj_gap. Of a step that others disturbed
another is taken.
"""

import argparse
import gc
import statistics

from bench import ROOT, Figure, Lap, build_trainer, calm, report, timed, use_threads

BAR = 0.1
OPTIMIZERS = sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml"))


def phases_of(optimizer: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of (forward and backward, the update, the refresh as amortised)."""
    from rsotrain.benchmark import BACKWARD, FORWARD, OPTIMIZER, REFRESH
    from rsotrain.benchmark.phases import PhaseClock, attach
    from rsotrain.training.refreshes import all_bases_due, update_gap

    trainer = build_trainer(
        f"model={arguments.model}", f"optimizer={optimizer}", f"precision={arguments.precision}",
        f"batch_size={arguments.batch_size}", f"seq_len={arguments.seq_len}", "model.vocab_size=32000",
        *arguments.set,
    )  # fmt: skip
    clock = PhaseClock(trainer.device)
    attach(clock, trainer)
    trainer.train_step()
    laps: list[Lap] = []
    while len(calm(laps, 0)) < arguments.steps and len(laps) < 2 * arguments.steps:
        laps.append(timed(lambda: clock.step(trainer.train_step)))
    steps = [lap.value for lap in calm(laps, arguments.steps)]
    gap, refresh = update_gap(trainer), 0.0
    if gap is not None:
        with all_bases_due(trainer):
            refresh = clock.step(trainer.train_step)[REFRESH] / gap
    passes = statistics.median(step[FORWARD] + step[BACKWARD] for step in steps)
    return passes, statistics.median(step[OPTIMIZER] for step in steps), refresh


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_130m")
    parser.add_argument("--precision", default="bf16_mixed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of every run"
    )
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    measured = {}
    for optimizer in arguments.optimizers:
        measured[optimizer] = phases_of(optimizer, arguments)
        gc.collect()
        passes, update, refresh = measured[optimizer]
        print(f"{optimizer}: {passes:.2f} + {update:.3f} + {refresh:.3f} s", flush=True)
    full = [passes for name, (passes, _, _) in measured.items() if not name.startswith("rso")]
    figures = []
    for name, (own, update, refresh) in measured.items():
        passes = own if name.startswith("rso") else statistics.median(full)
        detail = f"update {update * 1000:.0f} ms, refresh {refresh * 1000:.0f} ms, of {passes:.2f} s"
        share = (update + refresh) / passes
        figures.append(Figure("of forward + backward", name, 100 * share, 100 * BAR, False, " %", detail))
    conditions = (
        f"{arguments.model}, {arguments.precision}, {arguments.batch_size} x {arguments.seq_len} tokens,"
        f" vocabulary 32000, {arguments.threads} threads: optimizer step of forward + backward"
    )
    report("optimizer_share", conditions, figures)


if __name__ == "__main__":
    main()
