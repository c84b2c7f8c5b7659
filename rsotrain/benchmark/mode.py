"""``mode=benchmark``: the configured training step on random tokens, timed by phase."""

import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from rsotrain.benchmark import PHASES, REFRESH
from rsotrain.benchmark.phases import (
    PhaseClock,
    attach,
    communication_seconds,
)
from rsotrain.benchmark.tables import print_benchmark
from rsotrain.config.identity import run_name
from rsotrain.config.keys import flatten, plain
from rsotrain.config.schema import Config
from rsotrain.errors import require
from rsotrain.files import os_errors_said, write_json_atomic
from rsotrain.models.build import COMPUTE_DTYPE
from rsotrain.parallel.ranks import World, start
from rsotrain.tracking.escaping import print_line
from rsotrain.tracking.metrics import forget_peak_memory, peak_memory_bytes
from rsotrain.training.composition import check_composition
from rsotrain.training.determinism import settle
from rsotrain.training.flops import matmul_flops_per_second
from rsotrain.training.guard import Guard, unguarded
from rsotrain.training.random_data import random_data
from rsotrain.training.refreshes import all_bases_due, groups_with_bases, update_gap
from rsotrain.training.trainer import Trainer
from rsotrain.training.trial import try_plugged

BENCHMARKS_FOLDER = "benchmarks"  # not the run's folder: what is timed has not been trained
MIN_REFRESHES = 2


def benchmark_mode(config: Config, guard: Guard = unguarded) -> dict[str, Any]:
    """Time ``config``'s step; print the result, write it to ``benchmarks/`` of the output folder, return it.

    Seconds are medians over ``benchmark.steps`` steps, and means over ranks. ``refresh`` is amortised: the
    time that refreshing all bases adds to a step, divided by ``optimizer.update_proj_gap``. Raises UserError
    for what cannot be composed and for a folder that cannot be written.
    """
    settle(config.deterministic)
    world = start(config.parallelism, config.device)
    with world.reporting_losses(), world.ending_together():
        world.together(lambda: check_composition(config))
        if (untried := try_plugged(config, world)) is not None and world.is_main:
            print_line(untried)
        data = world.in_turn(lambda: random_data(config))
        folder = Path(world.from_main(lambda: str(_make_folder(config))))
        rate = _matmul_rate(config, world)  # of matrices that are larger than a small model
        forget_peak_memory(world.device)
        with guard(config, world):
            result = _measure(Trainer(config, data, world), folder, rate)
    result = {"run": run_name(config), **_machine(world), **result, "settings": dict(flatten(plain(config)))}
    if world.is_main:
        print_benchmark(result)
        file = folder / f"{run_name(config)}.json"
        with os_errors_said(f"{file} cannot be written"):
            write_json_atomic(file, result)
        print_line(f"benchmark: {file}")
    return result


def _make_folder(config: Config) -> Path:
    folder = Path(config.output_dir).expanduser() / BENCHMARKS_FOLDER
    with os_errors_said(f"output_dir={config.output_dir} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _matmul_rate(config: Config, world: World) -> float:
    return matmul_flops_per_second(world.device, COMPUTE_DTYPE[config.precision])


def _measure(trainer: Trainer, folder: Path, first_rate: float) -> dict[str, Any]:
    """``first_rate``: of matrix products, as measured before; the better of two such counts."""
    config, world, gap = trainer.config, trainer.world, update_gap(trainer)
    gaps = sorted({group.subspace.gap for group in groups_with_bases(trainer)})
    require(
        len(gaps) < 2,
        "mode=benchmark divides the time of a refresh of all bases by update_proj_gap, of which the methods"
        f" of optimizer.groups have several ({', '.join(map(str, gaps))}); give them the same",
    )
    settings = config.benchmark
    clock = PhaseClock(trainer.device)
    attach(clock, trainer)
    for _ in range(settings.warmup_steps):
        trainer.train_step()
    steps = [clock.step(trainer.train_step) for _ in range(settings.steps)]
    refreshes = []
    for _ in range(max(MIN_REFRESHES, settings.steps // gap) if gap is not None else 0):
        with all_bases_due(trainer):
            refreshes.append(clock.step(trainer.train_step)[REFRESH])
    peak_bytes = peak_memory_bytes(trainer.device)
    best_rate = max(first_rate, _matmul_rate(config, world))
    samples = {phase: [step[phase] for step in steps] for phase in PHASES}
    phases = {phase: statistics.median(values) for phase, values in samples.items()}
    refresh = statistics.median(refreshes) if refreshes else 0.0
    phases[REFRESH] = refresh / gap if gap is not None else 0.0
    communication = _profile(trainer, folder)
    own = {**phases, "refresh of all": refresh, "communication": communication, "rate": best_rate}
    every = world.gathered((own, peak_bytes))
    mean = {key: statistics.fmean(values[key] for values, _ in every) for key in own}
    seconds = sum(mean[phase] for phase in PHASES)
    tokens = config.batch_size * config.seq_len
    rate = mean["rate"] * world.size
    return {
        "tokens_per_step": tokens,
        "throughput/step_seconds": seconds,
        "throughput/tokens_per_second": tokens / seconds,
        "throughput/mfu": tokens / seconds * trainer.flops_per_token / rate,
        **{f"phase/{phase}_seconds": mean[phase] for phase in PHASES},
        "phase/communication_seconds": mean["communication"],
        "refresh/seconds": mean["refresh of all"],
        "refresh/update_proj_gap": gap,
        "matmul_flops_per_second": rate,
        "flops_per_token": trainer.flops_per_token,
        **trainer.memory(),
        "memory/peak_bytes": max(peak for _, peak in every),
        "samples": samples | {REFRESH: refreshes},
    }


def _profile(trainer: Trainer, folder: Path) -> float:
    """Seconds of communication in a step; write the trace if it is wanted."""
    settings, world = trainer.config.benchmark, trainer.world
    if world.size == 1 and not settings.profile:
        return 0.0
    with torch.profiler.profile() as profile:
        for _ in range(settings.profile_steps):
            trainer.train_step()
    if settings.profile:
        rank = f"_rank{world.rank}" if world.size > 1 else ""
        trace = folder / f"{run_name(trainer.config)}.trace{rank}.json"
        with os_errors_said(f"{trace} cannot be written"):
            profile.export_chrome_trace(str(trace))
        if world.is_main:
            print_line(f"trace: {trace}, for chrome://tracing or https://ui.perfetto.dev")
    return communication_seconds(profile, settings.profile_steps)


def _machine(world: World) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
