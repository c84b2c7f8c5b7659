"""Plans as tables on the screen and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsotrain.errors import UserError
from rsotrain.files import write_json_atomic
from rsotrain.instruments.phases import Phase
from rsotrain.planner.cards import GIB
from rsotrain.planner.plan import Plan
from rsotrain.planner.roofline import ASSUMPTIONS, ASSUMPTIONS_OF_RANKS
from rsotrain.planner.tracker import Kind
from rsotrain.tracking.display import print_table, titled_table
from rsotrain.tracking.escaping import print_line
from rsotrain.tracking.formats import format_bytes, format_count, three_digits

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    Kind.parameters: "weights",
    Kind.gradients: "grads",
    Kind.optimizer_state: "state",
    Kind.activations: "activ.",
    Kind.gathered: "gather",
    Kind.temporaries: "temp.",
}
_FLOOR_NAMES = {
    Kind.parameters: "weights",
    Kind.gradients: "gradients",
    Kind.optimizer_state: "optimizer state",
    Kind.activations: "kept activations",
    Kind.gathered: "one gathered block",
}
_SHORT = {Phase.forward.value: "fwd", Phase.backward.value: "bwd", Phase.optimizer_step.value: "update"}
_COMPARED = ("RTX 4090", "A100-80", "H100")  # beside each other, in a terminal of 80 columns
_MIB = 2**20
PLANS = "plans.json"


def print_plan(plan: Plan) -> None:
    """Print a plan in tables of at most 80 columns."""
    print_table(_phases(plan))
    print(_floor(plan))
    tables = [_parts(plan), _gpus(plan)]
    for table in [*tables, _traffic(plan)] if plan.traffic["step"] else tables:
        print_table(table)
    if plan.formula_state is not None and plan.formula_state != plan.optimizer_state:
        print_line(
            f"warning: the optimizer state has {plan.optimizer_state.total:,} bytes, but by the formula of"
            f" optimizer={plan.settings['optimizer']} it has {plan.formula_state.total:,}"
        )
    print(f"FLOPs per token: {format_count(plan.flops_per_token)}")
    if plan.speeds:
        print_table(_speeds(plan))
        print_line(ASSUMPTIONS)
        if plan.settings["world_size"] > 1:
            print_line(ASSUMPTIONS_OF_RANKS)


def _phases(plan: Plan) -> "Table":
    from rich.text import Text

    size, unit = (GIB, "GiB") if plan.peak >= GIB else (_MIB, "MiB")
    settings = plan.settings
    ranks = "" if settings["world_size"] == 1 else f", rank 0 of {settings['world_size']}"
    table = titled_table(
        f"{settings['model']}, {settings['optimizer']}: memory by phase, {unit}"
        f" ({settings['micro_batch_size']} × {settings['seq_len']} tokens{ranks})"
    )
    table.add_column("", style="bold", no_wrap=True)
    for heading in (*_HEADINGS.values(), "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase, kinds in plan.phases.items():
        cells = [f"{kinds[kind.value] / size:.2f}" for kind in _HEADINGS]
        style = "bold" if kinds["peak"] == plan.peak else ""
        table.add_row(phase, *cells, Text(f"{kinds['peak'] / size:.2f}", style=style))
    return table


def _floor(plan: Plan) -> str:
    """The least memory of this configuration, and what the planned peak has beyond it."""
    names = [_FLOOR_NAMES[kind] for kind in Kind if plan.floor.kinds.get(kind.value)]
    kind, nbytes = plan.floor.excess
    above = plan.peak / plan.floor.total - 1
    said = f"floor: {format_bytes(plan.floor.total)} ({' + '.join(names)}); the peak is {above:.1%} above it"
    if nbytes > 0:
        said += f", of which {kind} {format_bytes(nbytes)}"
    if plan.floor.grams_at_once:
        said += "; optimizer.staggered=true holds XᵀX of a few inputs at a time, not of all"
    return said


def _parts(plan: Plan) -> "Table":
    table = titled_table("Exact bytes of the parts")
    table.add_column("", style="bold", no_wrap=True)
    binary, decimal = (("GiB", GIB), ("GB", 1e9)) if plan.peak >= GIB else (("MiB", _MIB), ("MB", 1e6))
    units = (binary, decimal)
    for heading in ("{}", "blocks, {}"):
        for unit, _ in units:
            table.add_column(heading.format(unit), justify="right", no_wrap=True)
    for name, share in (
        ("weights", plan.parameters),
        ("gradients", plan.gradients),
        ("optimizer state", plan.optimizer_state),
        ("  by its formula", plan.formula_state),
    ):
        if share is None:
            continue
        cells = [nbytes / size for nbytes in (share.total, share.blocks) for _, size in units]
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    saved = [plan.saved_activations / size for _, size in units]
    table.add_row("saved activations", *(f"{cell:.3f}" for cell in saved), "", "")
    return table


def _gpus(plan: Plan) -> "Table":
    from rich.text import Text

    table = titled_table("Which GPUs hold it")
    table.add_column("GPU", style="bold", no_wrap=True)
    table.add_column("such as", no_wrap=True)
    table.add_column("usable", justify="right", no_wrap=True)
    table.add_column(f"micro-batch {plan.settings['micro_batch_size']}", no_wrap=True)
    table.add_column("largest micro-batch", justify="right", no_wrap=True)
    for fit in plan.gpus:
        table.add_row(
            fit.gpu,
            fit.examples,
            format_bytes(fit.usable),
            Text("fits", style="green") if fit.fits else Text("does not fit", style="red"),
            f"{fit.micro_batch:,}" if fit.micro_batch else "none",
        )
    return table


def _speeds(plan: Plan) -> "Table":
    """Milliseconds of a step; which GPUs hold it is another table's."""
    table = titled_table("A step to expect: milliseconds")
    table.add_column("GPU", style="bold", no_wrap=True)
    phases = [*plan.speeds[0].phases]
    for heading in (*(_SHORT.get(phase, phase) for phase in phases), "step", "tok/s", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for speed in plan.speeds:
        table.add_row(
            speed.gpu,
            *(three_digits(1000 * speed.phases[phase]) for phase in phases),
            three_digits(1000 * speed.step_seconds),
            format_count(speed.tokens_per_second),
            f"{speed.mfu:.0%}",
            speed.bound_by,
        )
    return table


def _traffic(plan: Plan) -> "Table":
    columns = {"step": "a step", "refresh": "one that samples new bases"}
    columns = {key: heading for key, heading in columns.items() if key in plan.traffic}
    table = titled_table("Bytes that a rank sends")
    table.add_column("", style="bold", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    kinds = sorted({kind for key in columns for kind, nbytes in plan.traffic[key].items() if nbytes})
    for kind in kinds:
        table.add_row(kind, *(format_bytes(plan.traffic[key].get(kind, 0)) for key in columns))
    table.add_section()
    table.add_row("all", *(format_bytes(sum(plan.traffic[key].values())) for key in columns))
    return table


def write_picture(bars: Mapping[str, Mapping[str, int]], path: Path) -> str:
    """Draw the bytes by kind, a bar for each name; return a sentence for the user."""
    from rsotrain.tracking.drawing import stacked_bytes, write_png

    parts = {
        kind.value: [float(kinds[kind.value]) for kinds in bars.values()]
        for kind in Kind
        if any(kinds[kind.value] for kinds in bars.values())
    }
    try:
        write_png(stacked_bytes(list(bars), parts), path)
    except UserError as error:  # without matplotlib the plan is still valid
        return f"no picture: {error}"
    return f"picture: {path}"


# Settings that follow from another one, which labels omit beside it.
_BROUGHT = {
    "model": ("hidden_size", "num_hidden_layers"),
    "optimizer": ("sampler", "rank", "update_proj_gap", "staggered"),
    "world_size": ("batch_size",),
}
_ABSENT = (None, "none", False)
_BY_ITSELF = (
    "model",
    "optimizer",
    "sampler",
    "precision",
    "parallelism",
)  # clear without their key


def labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each plan, of the settings by which the plans differ."""

    def named(keys: Sequence[str]) -> list[str]:
        return [
            " ".join(str(s[k]) if k in _BY_ITSELF else f"{k}={s[k]}" for k in keys if s[k] not in _ABSENT)
            for s in settings
        ]

    varying = [key for key in settings[0] if any(s[key] != settings[0][key] for s in settings)]
    brought = [key for choice in varying for key in _BROUGHT.get(choice, ())]
    for keys in ([key for key in varying if key not in brought], varying):
        found = named(keys)
        if len(set(found)) == len(found):
            return [name or "as given" for name in found]
    return [f"{n} {name}".rstrip() for n, name in enumerate(found, 1)]


def print_plans(plans: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Print several plans, given as in their files, side by side; write them and a picture to ``folder``.

    ``folder`` has all of them, while runs that differ in parallelism or micro-batch alone share a name,
    so that the file of that name is the last one's.
    """
    names = labels([plan["settings"] for plan in plans])
    table = titled_table("Memory of one rank, GiB")
    table.add_column("", style="bold", overflow="fold")
    for heading in ("weights", "grads", "state", "activ.", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits on", no_wrap=True)
    for name, plan in zip(names, plans, strict=True):
        nbytes = [plan[part]["total"] for part in ("parameters", "gradients", "optimizer_state")]
        nbytes += [plan["saved_activations"], plan["peak"]]
        smallest = next((fit["gpu"] for fit in plan["gpus"] if fit["fits"]), "none")
        table.add_row(name, *(f"{n / GIB:.2f}" for n in nbytes), smallest)
    print_table(table)
    if all(plan["speeds"] for plan in plans):
        print_table(_speeds_beside(names, plans))
    bars = {name: peak_of(plan["phases"]) for name, plan in zip(names, plans, strict=True)}
    write_json_atomic(folder / PLANS, dict(zip(names, plans, strict=True)))
    print_line(f"plans: {folder / PLANS}")
    print_line(write_picture(bars, folder / "plans.png"))


def _speeds_beside(names: Sequence[str], plans: Sequence[Mapping[str, Any]]) -> "Table":
    """Milliseconds of a step, and relative to the first plan's."""
    table = titled_table("A step to expect: milliseconds, and of the first plan's")
    table.add_column("", style="bold", overflow="fold")
    for card in _COMPARED:
        table.add_column(card, justify="right", no_wrap=True)
    first: dict[str, float] = {}
    for name, plan in zip(names, plans, strict=True):
        seconds = {s["gpu"]: s["step_seconds"] for s in plan["speeds"]}
        first = first or seconds
        cells = (f"{three_digits(1000 * seconds[g])}  {seconds[g] / first[g]:.2f}" for g in _COMPARED)
        table.add_row(name, *cells)
    return table


def peak_of(phases: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    """Bytes by kind in the phase with the highest peak."""
    return max(phases.values(), key=lambda kinds: kinds["peak"])
