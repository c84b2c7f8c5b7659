"""What mode=benchmark prints: one result, or several side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rsotrain.benchmark import PHASES
from rsotrain.tracking.display import titled_table
from rsotrain.tracking.formats import format_bytes, format_count, format_seconds

Result = Mapping[str, Any]

WIDE = 130  # columns of a terminal that has room for all figures of a comparison
# what a comparison is not made by: where files go, not what is timed
_ASIDE = {"run_name", "output_dir", "overwrite", "cache_dir", "logger", "benchmark", "mode"}


def print_benchmark(result: Result) -> None:
    """The step by phase, then what follows from it."""
    from rich.console import Console

    step = result["throughput/step_seconds"]
    table = titled_table("Training step")
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for phase in PHASES:
        seconds = result[f"phase/{phase}_seconds"]
        table.add_row(_phase_label(result, phase), format_seconds(seconds), f"{seconds / step:.1%}")
    table.add_section()
    table.add_row("step", format_seconds(step), "")
    if result["world_size"] > 1:
        seconds = result["phase/communication_seconds"]
        table.add_row("communication, in and beside these", format_seconds(seconds), f"{seconds / step:.1%}")
    table.add_section()
    for name, text in _figures(result):
        table.add_row(name, text, "")
    Console().print(table, highlight=False)
    print(_where(result))


def _phase_label(result: Result, phase: str) -> str:
    gap = result["refresh/update_proj_gap"]
    if phase != "refresh" or gap is None:
        return phase
    return f"refresh, {format_seconds(result['refresh/seconds'])} every {gap} steps"


def _figures(result: Result) -> list[tuple[str, str]]:
    rate = result["matmul_flops_per_second"]
    return [
        ("tokens per second", format_count(result["throughput/tokens_per_second"])),
        (f"MFU, of the {rate / 1e12:.3g} TFLOP/s measured", f"{result['throughput/mfu']:.1%}"),
        ("peak memory", format_bytes(result["memory/peak_bytes"])),
        ("optimizer state", format_bytes(result["memory/optimizer_state_bytes"])),
        ("saved activations", format_bytes(result["memory/saved_activations_bytes"])),
    ]


def _where(result: Result) -> str:
    ranks = f", {result['world_size']} processes" if result["world_size"] > 1 else ""
    return f"{result['device']}, {result['threads']} threads{ranks}, torch {result['torch']}"


def labels(results: Sequence[Result]) -> list[str]:
    """Each result by the settings in which they differ; names first, the other keys with their last word."""
    settings = [result["settings"] for result in results]
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [
        key
        for key in keys
        if key.split(".")[0] not in _ASIDE and len({repr(one.get(key)) for one in settings}) > 1
    ]
    names = [key for key in differing if key.endswith(".name")]
    # a group's name stands for its other settings where it tells the same results apart
    others = [key for key in differing if key not in names and not _follows(key, names, settings)]
    return [
        " ".join(
            [str(one[key]) for key in names if one[key] != "none"]
            + [f"{key.split('.')[-1]}={one[key]}" for key in others if one.get(key) is not None]
        )
        or "same settings"
        for one in settings
    ]


def _follows(key: str, names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> bool:
    """Do results with the same ``names`` have the same ``key``?"""
    values: dict[tuple[Any, ...], set[str]] = {}
    for one in settings:
        values.setdefault(tuple(one[name] for name in names), set()).add(repr(one.get(key)))
    return bool(names) and all(len(found) == 1 for found in values.values())


def print_benchmarks(results: Sequence[Result]) -> None:
    """One line a result, the fastest first, with its rate relative to that of the first that was run.

    A narrow terminal gets no column for each phase.
    """
    from rich.console import Console

    console = Console()
    phases = PHASES if console.width >= WIDE else ()
    table = titled_table("Benchmark")
    table.add_column("", style="bold", overflow="fold")
    for name in (*phases, "step", "tokens/s", "of first", "MFU", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    first = results[0]["throughput/tokens_per_second"]
    by_rate = sorted(
        zip(labels(results), results, strict=True), key=lambda pair: -pair[1]["throughput/tokens_per_second"]
    )
    for label, result in by_rate:
        rate = result["throughput/tokens_per_second"]
        table.add_row(
            label,
            *(format_seconds(result[f"phase/{phase}_seconds"]) for phase in phases),
            format_seconds(result["throughput/step_seconds"]),
            format_count(rate),
            f"{rate / first:.2f}",
            f"{result['throughput/mfu']:.1%}",
            format_bytes(result["memory/peak_bytes"]),
        )
    console.print(table, highlight=False)
