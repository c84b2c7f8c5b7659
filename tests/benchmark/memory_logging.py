"""What the live memory breakdown costs: processor time of a record of it, of that of a training step.

    python tests/benchmark/memory_logging.py [--optimizers adam galore rso_pca] [--model llama_9m]

A step and a record alternate: the bytes of the parts, the peak, a line of JSON. A run has a record in each
``log_every`` steps (10 by default) and at most one more with each round of new bases: here it is paid for in
every step, which is the most that can be asked for. Processor time, since what is measured is short and the
machine may have others.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench import Figure, build_trainer, report, use_threads

BAR = 1.0  # percent


def record(trainer: Any) -> str:
    """As ``TrainingRun`` makes it."""
    from rsotrain.instruments.memory import memory_metrics
    from rsotrain.tracking.metrics import peak_memory_bytes

    device = trainer.device
    return json.dumps(memory_metrics(trainer.memory(), peak_memory_bytes(device), device.type))


def processor_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def costs(trainer: Any, rounds: int) -> tuple[float, float]:
    """Medians of the seconds of a step and of a record."""
    steps, records = [], []
    for round_index in range(rounds + 2):  # the first two are slower
        step = processor_seconds(trainer.train_step)
        own = processor_seconds(lambda: record(trainer))
        if round_index >= 2:
            steps.append(step)
            records.append(own)
    return statistics.median(steps), statistics.median(records)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizers", nargs="+", default=["adam", "galore", "rso_pca"])
    parser.add_argument("--model", default="llama_9m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    use_threads(1)
    figures = []
    for optimizer in arguments.optimizers:
        trainer = build_trainer(
            f"model={arguments.model}", f"optimizer={optimizer}", f"batch_size={arguments.batch_size}",
            f"seq_len={arguments.seq_len}",
        )  # fmt: skip
        step, own = costs(trainer, arguments.rounds)
        detail = f"{own * 1e6:.0f} µs of {step * 1e3:.0f} ms"
        figures.append(Figure("of the step", optimizer, 100 * own / step, BAR, False, " %", detail))
    conditions = (
        f"{arguments.model}, {arguments.batch_size} x {arguments.seq_len} tokens, one thread:"
        " memory/* in every step"
    )
    report("memory_logging", conditions, figures)


if __name__ == "__main__":
    main()
