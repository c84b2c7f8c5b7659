"""How the step's time grows with model, sequence, batch, rank and ranks, beside how its FLOPs grow.

    python tests/benchmark/growth.py [--series model sequence batch rank ranks] [--optimizer rso]

FLOPs are those of forward and backward (``rsotrain.training.flops``), for RSO with the products by its bases
in the place of the weights' gradients. Of each pair of neighbours in a series, how much faster than its FLOPs
the time has grown. ``ranks``: the same work for each rank, 8 sequences and one thread. Medians of undisturbed
steps. The picture is tests/benchmark/growth.png.
"""

import argparse
import gc
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import ROOT, Figure, build_trainer, calm, configuration, median_seconds, report, timed, use_threads

sys.path.insert(0, str(ROOT / "tests"))

BAR = 1.2
RANK_BATCH = 8  # sequences of each rank, as in the other benchmarks
MODELS = ("llama_9m", "llama_20m", "llama_35m", "llama_60m", "llama_130m", "llama_350m")
PICTURE = Path(__file__).with_name("growth.png")


class Point(NamedTuple):
    label: str
    seconds: float
    flops: float


def step_flops(trainer: Any) -> float:
    """Matrix-product FLOPs of a step's forward and backward, on this rank."""
    from rsotrain.optim.rso import RSO

    config = trainer.config
    tokens = config.batch_size * config.seq_len / trainer.world.size
    flops = trainer.flops_per_token * tokens
    for optimizer in trainer.optimizer.groups:
        if isinstance(optimizer, RSO):
            for group in optimizer.input_groups:
                rows = sum(layer.weight.shape[0] for layer in group.layers.values())
                # x P and dYᵀ Z instead of dYᵀ X
                flops += 2 * tokens * (group.size * group.rank + rows * group.rank - rows * group.size)
    return flops


def measure(label: str, steps: int, *overrides: str) -> Point:
    trainer = build_trainer(*overrides)
    point = measure_trainer(label, steps, trainer)
    print(f"{label}: {point.seconds:.3f} s, {point.flops / point.seconds / 1e9:.0f} GFLOP/s", flush=True)
    return point


def measure_trainer(label: str, steps: int, trainer: Any) -> Point:
    trainer.train_step()
    trainer.train_step()
    laps = [timed(trainer.train_step)]
    while len(calm(laps, 0)) < steps and len(laps) < 3 * steps:
        laps.append(timed(trainer.train_step))
    point = Point(label, median_seconds(calm(laps, steps)), step_flops(trainer))
    del trainer
    gc.collect()
    return point


def of_ranks(number: int, steps: int, overrides: tuple[str, ...]) -> Point:
    from helpers import ranks

    from rsotrain.training.random_data import random_data
    from rsotrain.training.trainer import Trainer

    if number == 1:
        return measure("1 rank", steps, *overrides, f"batch_size={RANK_BATCH}")
    config = configuration(*overrides, f"batch_size={RANK_BATCH * number}", "parallelism=fsdp")
    data = random_data(config)

    def check(world: Any) -> Point:
        trainer = Trainer(config, data, world)
        trainer.train_step()
        trainer.train_step()
        laps = [timed(trainer.train_step) for _ in range(steps)]  # the other rank is no disturbance
        return Point(f"{number} ranks", median_seconds(laps), step_flops(trainer))

    with tempfile.TemporaryDirectory() as folder:
        outcomes = ranks.run(number, {"growth": check}, Path(folder))
    point = ranks.succeeded(outcomes["growth"])[0]
    print(f"{number} ranks: {point.seconds:.3f} s", flush=True)
    return point


def measured_series(names: list[str], optimizer: str, steps: int) -> Iterator[tuple[str, list[Point]]]:
    base = (f"optimizer={optimizer}", "model.vocab_size=32000", "optimizer.update_proj_gap=100000")
    small = (*base, "model=llama_20m")
    if "ranks" in names:  # the first to run are the forked ones: a process that has computed cannot be forked
        yield "ranks", [of_ranks(number, steps, (*small, "seq_len=256")) for number in (2, 1)][::-1]
    if "model" in names:
        sized = (*base, "batch_size=4", "seq_len=256")
        yield "model", [measure(m.removeprefix("llama_"), steps, f"model={m}", *sized) for m in MODELS]
    if "sequence" in names:
        lengths = (128, 256, 512, 1024, 2048)
        longest = ("model.max_position_embeddings=2048",)
        yield (
            "sequence",
            [measure(f"{s}", steps, *small, *longest, f"seq_len={s}", "batch_size=2") for s in lengths],
        )
    if "batch" in names:
        sizes = (1, 2, 4, 8, 16, 32)
        yield "batch", [measure(f"{b}", steps, *small, "seq_len=256", f"batch_size={b}") for b in sizes]
    if "rank" in names:
        shares = (0.0625, 0.125, 0.25, 0.5, 1.0)
        sized = (*small, "seq_len=256", "batch_size=8")
        yield "rank", [measure(f"{s:g}", steps, *sized, f"optimizer.rank={s}") for s in shares]


def excess(points: list[Point]) -> tuple[float, str]:
    """(largest growth of time over growth of FLOPs between neighbours, which they are)."""
    growths = [
        ((b.seconds / a.seconds) / (b.flops / a.flops), f"{a.label} to {b.label}")
        for a, b in itertools.pairwise(points)
    ]
    return max(growths)


def draw(series: dict[str, list[Point]]) -> None:
    """Time and FLOPs of each series, relative to its first point, on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    from rsotrain.tracking.drawing import drawing_in
    from rsotrain.tracking.theme import LIGHT

    with drawing_in(LIGHT, **{"font.size": 9, "axes.spines.left": True}):
        size = (2.1 * len(series), 2.4)
        figure, axes = pyplot.subplots(1, len(series), figsize=size, facecolor=LIGHT.surface)
        for axis, (name, points) in zip(axes if len(series) > 1 else [axes], series.items(), strict=True):
            positions = range(len(points))
            flops = [p.flops / points[0].flops for p in points]
            seconds = [p.seconds / points[0].seconds for p in points]
            axis.plot(positions, flops, color=LIGHT.muted, linestyle="--", label="FLOPs")
            axis.plot(positions, seconds, color=LIGHT.series[0], marker="o", markersize=4, label="time")
            axis.set(title=name, yscale="log", xticks=positions)
            axis.set_xticklabels([p.label for p in points], rotation=45)
            axis.grid(visible=False, axis="x")
            axis.set_ylim(0.8, 1.25 * max(2.0, *flops, *seconds))  # little growth is to look like little
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
            axis.yaxis.set_minor_formatter(lambda *_: "")
        figure.legend(*axis.get_legend_handles_labels(), loc="upper right", ncols=2)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        figure.savefig(PICTURE, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ("ranks", "model", "sequence", "batch", "rank")
    parser.add_argument("--series", nargs="+", choices=every, default=list(every))
    parser.add_argument("--optimizer", default="rso")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    use_threads(1)
    series = {}
    for name, points in measured_series(arguments.series, arguments.optimizer, arguments.steps):
        use_threads(arguments.threads)
        series[name] = points
    figures = []
    for name, points in series.items():
        most, where = excess(points)
        figures.append(Figure("growth of time over that of FLOPs", name, most, BAR, False, "", where))
    draw(series)
    report("growth", f"optimizer={arguments.optimizer}, llama_20m but for the series of models", figures)


if __name__ == "__main__":
    main()
