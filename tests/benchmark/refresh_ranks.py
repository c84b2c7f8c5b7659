"""Seconds of a refresh of all bases on one rank and on several: the samplers' work is divided among them.

    python tests/benchmark/refresh_ranks.py [--model llama_130m] [--ranks 2] [--rounds 2]

Each rank is a process with one thread; runs alternate, and the medians are compared. On a machine that
others use, too, the wall time of two processes says little: the processor time is printed beside it. The
gradients are random, with a spectrum like that of a training step: a few large directions above a floor.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import ranks
from helpers.runs import compose

from rsotrain.config.schema import Config
from rsotrain.models.build import build_model, materialize
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.subspace_optimizer import SubspaceOptimizer
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import shard_model, shard_of


def refresh_seconds(config: Config, world: World) -> tuple[float, float]:
    """(wall time, this process's own time) of a refresh of all matrices, not the first."""
    model = build_model(
        config.model, vocab_size=64, precision=config.precision, device=torch.device("meta"), seed=0
    )

    def place(model: torch.nn.Module, by_rows: object) -> None:
        if world.mesh is not None:
            shard_model(model, list(model.model.layers), world.mesh, config.precision)
        materialize(model, world.device, 0)

    optimizer = build_optimizer(
        model,
        config.optimizer,
        config.sampler,
        precision=config.precision,
        seed=0,
        total_steps=10,
        place=place,
    )
    group = optimizer.groups[0]
    assert isinstance(group, SubspaceOptimizer)
    gradients = {}
    for m in group.matrices:
        generator = torch.Generator().manual_seed(group.bases.positions[m.name])
        rows, columns = m.shard.shape
        large = torch.randn(rows, 64, generator=generator) @ torch.randn(64, columns, generator=generator)
        whole = large + torch.randn(rows, columns, generator=generator)
        piece = shard_of(m.parameter).of(whole).clone()
        gradients[m.name] = piece if m.side.name == "right" else piece.T
    with torch.no_grad():
        seconds = []
        for step in (1, 2):
            world.sum([0.0])
            start, own = time.perf_counter(), time.process_time()
            group.refresh(gradients, step, 1.0, after_update=False)
            world.sum([0.0])
            seconds.append((time.perf_counter() - start, time.process_time() - own))
    return seconds[-1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama_130m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = compose(
        [f"model={arguments.model}", "optimizer=galore", "optimizer.update_proj_gap=1", "precision=fp32"]
    )
    one: list[tuple[float, ...]] = []
    several: list[tuple[float, ...]] = []
    for _ in range(arguments.rounds):
        one.append(refresh_seconds(config, World(torch.device("cpu"))))
        check = {"refresh": partial(refresh_seconds, config)}
        outcomes = ranks.run(arguments.ranks, check, Path(tempfile.mkdtemp()))
        several.append(tuple(map(max, zip(*ranks.succeeded(outcomes["refresh"]), strict=True))))
        print(f"1 rank {one[-1]}, {arguments.ranks} ranks {several[-1]}", flush=True)
    for i, kind in enumerate(("wall time", "processor time of the busiest rank")):
        a, b = (statistics.median(times[i] for times in runs) for runs in (one, several))
        print(f"{arguments.model}, {kind}: 1 rank {a:.2f} s, {arguments.ranks} ranks {b:.2f} s: {b / a:.2f}")


if __name__ == "__main__":
    main()
