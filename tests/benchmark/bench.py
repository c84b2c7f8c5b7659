"""What the benchmarks share: trainers on random tokens, fair timing, and figures with their bars.

Other programs on the machine disturb the clock: what is compared is run in turn, steps during which others
used the processor are not counted and are made up for, and medians are given.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "outputs" / "benchmark"
MAX_DISTURBANCE = 0.03  # others' processor seconds per second and core of a step that counts
MAX_EXTRA = 4  # a step is tried this many times as often as it is to count, then the calmest count
MIB = 2**20
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Figure:
    """``what``, measured of ``of``, and what it has to reach; ``at_least``: from below, or from above."""

    what: str
    of: str
    value: float
    bar: float | None = None
    at_least: bool = True
    unit: str = ""
    detail: str = ""

    @property
    def name(self) -> str:
        return f"{self.what}: {self.of}"

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        bound = "at least" if self.at_least else "at most"
        return f"{bound} {self.bar:g}{self.unit}: {'met' if self.met else 'MISSED'}"


def report(name: str, conditions: str, figures: Sequence[Figure]) -> None:
    """Print the figures and keep them for the table of this folder's README.md."""
    print(conditions)
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        value = f"{figure.value:8.3g}{figure.unit:2}"
        print(f"{figure.name:{width}}  {value} {figure.verdict:24} {figure.detail}".rstrip(), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"tests/benchmark/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    content = {"conditions": conditions, "command": command, "figures": [asdict(f) for f in figures]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def other_processes_seconds() -> float:
    """Processor seconds that the machine spent on anything but this process, since it started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


@dataclass(frozen=True)
class Lap:
    seconds: float
    disturbance: float  # others' processor seconds per second and core
    value: Any  # what was returned


def timed(function: Callable[[], Any]) -> Lap:
    start, before = time.perf_counter(), other_processes_seconds()
    value = function()
    seconds = time.perf_counter() - start
    others = other_processes_seconds() - before
    return Lap(seconds, others / seconds / (os.cpu_count() or 1), value)


def calm(laps: Sequence[Lap], count: int, limit: float = MAX_DISTURBANCE) -> list[Lap]:
    """Those that others disturbed little; where they are fewer than ``count``, the calmest of all."""
    undisturbed = [lap for lap in laps if lap.disturbance <= limit]
    return undisturbed if len(undisturbed) >= count else sorted(laps, key=lambda lap: lap.disturbance)[:count]


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    limit: float = MAX_DISTURBANCE,
    attempts: int = MAX_EXTRA,
) -> dict[str, list[Lap]]:
    """Call all in turn until each has ``rounds`` calm laps; the first ``warmup`` of each do not count."""
    laps: dict[str, list[Lap]] = {name: [] for name in functions}
    for round_index in range(warmup + attempts * rounds):
        for name, function in functions.items():
            enough = sum(lap.disturbance <= limit for lap in laps[name]) >= rounds
            if round_index < warmup:
                function()
            elif not enough:
                laps[name].append(timed(function))
    return {name: calm(of_name, rounds, limit) for name, of_name in laps.items()}


def median_seconds(laps: Sequence[Lap]) -> float:
    return statistics.median(lap.seconds for lap in laps)


@contextmanager
def composing() -> Any:
    """Inside, ``compose`` reads the configuration."""
    from hydra import initialize_config_dir

    from rsotrain.cli.compose import register_schemas
    from rsotrain.config.defaults import conf_dir

    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        yield


def configuration(*overrides: str) -> Any:
    """The typed configuration of a command line."""
    from hydra import compose

    from rsotrain.cli.compose import to_config

    common = ["logger=jsonl", "steps=1000000", "precision=bf16_mixed"]
    with composing():
        return to_config(compose("config", [*common, *overrides]))


def build_trainer(*overrides: str) -> Any:
    """The Trainer of a command line, on random tokens."""
    from rsotrain.training.random_data import random_data
    from rsotrain.training.trainer import Trainer

    config = configuration(*overrides)
    return Trainer(config, random_data(config))


def use_threads(count: int) -> None:
    """As the rsotrain command runs: its allocator settings, ``count`` threads."""
    import torch

    from rsotrain.running.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(count)


def galore_torch_module(name: str) -> Any:
    """A module of the galore-torch package, without the package's ``__init__``, which wants bitsandbytes."""
    import importlib
    import importlib.util
    import types

    if "galore_torch" not in sys.modules:
        spec = importlib.util.find_spec("galore_torch")
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit("the comparison needs galore-torch: pip install galore-torch")
        package = types.ModuleType("galore_torch")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["galore_torch"] = package
    return importlib.import_module(f"galore_torch.{name}")
