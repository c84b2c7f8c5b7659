"""Write the tables of rsotrain/planner/README.md: python tests/tools/memory_tables.py (a plan for each cell).

All are what mode=plan says, for a GPU, precision=bf16, vocabulary 32000, rank hidden/4 (apollo_mini: 1).
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.runs import compose  # noqa: E402

from rsotrain.config.schema import Config  # noqa: E402
from rsotrain.models.build import count_parameters  # noqa: E402
from rsotrain.planner.cards import GIB, GPUS  # noqa: E402
from rsotrain.planner.plan import make_plan  # noqa: E402

PAGE = ROOT / "rsotrain" / "planner" / "README.md"
VOCAB_SIZE = 32000
MODELS = ("60m", "130m", "350m", "1b", "7b")
OPTIMIZERS = ("adam", "galore", "sn_sm", "apollo_mini", "rso")
LARGEST_OPTIMIZERS = (*OPTIMIZERS, "rso_pca")
EVERY = sorted(
    path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml") if "8bit" not in path.stem
)  # of which the states here are those without it
BLOCK = "activation_checkpointing=block"
IN_BACKWARD = "optimizer.update_in_backward=true"
BF16 = [f"tokenizer.vocab_size={VOCAB_SIZE}", "precision=bf16", "optimizer.state_dtype=bfloat16"]


STAGGERED = "optimizer.staggered=true"
# The least memory that the settings give: states of 8 bits, bases that RSO makes for each use, and where they
# depend on data, one refresh after the other.
LEAN = {name: [f"optimizer={name}", "optimizer.state_dtype=int8"] for name in LARGEST_OPTIMIZERS}
LEAN["rso"] += ["optimizer.projection=regenerated"]
LEAN["rso_pca"] += [STAGGERED]


def run_of(model: str, optimizer: str, ranks: int, *more: str) -> Config:
    """One sequence of 1024 tokens at a time on each rank."""
    parallelism = [] if ranks == 1 else ["parallelism=fsdp", f"parallelism.world_size={ranks}"]
    sizes = ["seq_len=1024", "micro_batch_size=1", f"batch_size={ranks}", "steps=10000"]
    return compose([f"model=llama_{model}", f"optimizer={optimizer}", *BF16, *sizes, *parallelism, *more])


def cell(model: str, optimizer: str, ranks: int) -> str:
    """State and peak, GiB."""
    plan = make_plan(run_of(model, optimizer, ranks), gpus=False)
    return f"{plan.optimizer_state.total / GIB:.2f} / {plan.peak / GIB:.2f}"


def row(optimizer: str, cells: Iterable[str]) -> str:
    return f"| `{optimizer}` | {' | '.join(cells)} |"


def memory_table(ranks: int, pool: Executor) -> list[str]:
    cells = {o: [pool.submit(cell, model, o, ranks) for model in MODELS] for o in OPTIMIZERS}
    head = f"| {'one GPU' if ranks == 1 else f'{ranks} GPUs'} | {' | '.join(MODELS)} |"
    rows = [row(optimizer, (c.result() for c in planned)) for optimizer, planned in cells.items()]
    return [head, "|---" * (len(MODELS) + 1) + "|", *rows]


def lean_cell(optimizer: str, ranks: int, checkpointing: str) -> str:
    """Peak, GiB."""
    lean = [*LEAN[optimizer], f"activation_checkpointing={checkpointing}"]
    return f"{make_plan(run_of('7b', optimizer, ranks, *lean), gpus=False).peak / GIB:.2f}"


def lean_table(pool: Executor) -> list[str]:
    columns = [(ranks, checkpointing) for ranks in (1, 8) for checkpointing in ("none", "mlp", "block")]
    cells = {o: [pool.submit(lean_cell, o, *column) for column in columns] for o in OPTIMIZERS}
    heads = [f"{'one GPU' if ranks == 1 else '8 GPUs'}, {what}" for ranks, what in columns]
    rows = [row(optimizer, (c.result() for c in planned)) for optimizer, planned in cells.items()]
    return [f"| llama_7b | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|", *rows]


def in_backward_cell(optimizer: str, *more: str) -> str:
    """Gradients and peak, GiB."""
    plan = make_plan(run_of("7b", optimizer, 1, IN_BACKWARD, *more), gpus=False)
    return f"{plan.gradients.total / GIB:.2f} / {plan.peak / GIB:.2f}"


def in_backward_table(pool: Executor) -> list[str]:
    cells = {
        o: [pool.submit(in_backward_cell, o, *more) for more in ([], LEAN[o], [*LEAN[o], BLOCK])]
        for o in OPTIMIZERS
    }
    head = "| llama_7b, one GPU | states of bfloat16 | int8 | int8, block |"
    rows = [row(optimizer, (c.result() for c in planned)) for optimizer, planned in cells.items()]
    return [head, "|---|---|---|---|", *rows]


# --- the floor ---


FLOORS: dict[str, list[str]] = {name: [name] for name in EVERY}  # the optimizer, and more
FLOORS["rso_pca, staggered"] = ["rso_pca", STAGGERED]


def floor_cells(name: str) -> str:
    """Peak, GiB, and how far it is above the floor."""
    optimizer, *more = FLOORS[name]
    plan = make_plan(run_of("7b", optimizer, 1, *more), gpus=False)
    return f"{plan.peak / GIB:.2f} | {plan.peak / plan.floor.total - 1:+.1%}"


def floor_table(pool: Executor) -> list[str]:
    names = sorted(FLOORS)
    rows = [row(name, [cells]) for name, cells in zip(names, pool.map(floor_cells, names), strict=True)]
    return ["| llama_7b, one GPU | peak | above its floor |", "|---|---|---|", *rows]


# --- the largest model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    optimizer: str
    layers: int
    parameters: int
    peak: int


def with_layers(config: Config, layers: int) -> Config:
    return replace(config, model=replace(config.model, num_hidden_layers=layers))


def largest(optimizer: str, usable: int, lean: bool) -> Largest:
    """As many layers of llama_7b's width as fit: the peak is a straight line in them, and then planned."""
    config = run_of("7b", optimizer, 1, *(LEAN[optimizer] if lean else []))

    def peak(layers: int) -> int:
        return make_plan(with_layers(config, layers), gpus=False).peak

    low, high = 8, 12
    at = {low: peak(low), high: peak(high)}
    slope = (at[high] - at[low]) / (high - low)
    layers = int(low + (usable - at[low]) / slope)
    while (found := peak(layers)) > usable:
        layers -= 1
    return Largest(optimizer, layers, count_parameters(with_layers(config, layers).model, VOCAB_SIZE), found)


def largest_row(found: Largest) -> str:
    parameters = f"{found.parameters / 1e9:.2f} B"
    return f"| `{found.optimizer}` | {found.layers} | {parameters} | {found.peak / GIB:.2f} GiB |"


def largest_table(lean: bool, pool: Executor) -> list[str]:
    found = pool.map(partial(largest, usable=GPUS[0].usable, lean=lean), LARGEST_OPTIMIZERS)
    rows = sorted(found, key=lambda row: -row.parameters)
    return ["| | layers | parameters | peak |", "|---|---|---|---|", *map(largest_row, rows)]


TABLES: dict[str, Callable[[Executor], list[str]]] = {
    "one GPU": partial(memory_table, 1),
    "8 GPUs": partial(memory_table, 8),
    "8 bits": lean_table,
    "in backward": in_backward_table,
    "floor": floor_table,
    "largest": partial(largest_table, False),
    "largest, 8 bits": partial(largest_table, True),
}


def made(name: str, processes: int | None = None) -> list[str]:
    """The lines of a table, planned in as many processes as there are cores, or in so many."""
    spawn = get_context("spawn")  # a forked one would lack torch's threads
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return TABLES[name](pool)


def _span(page: str, name: str) -> tuple[int, int]:
    start, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
    return page.index(start) + len(start), page.index(end)


def table_in(page: str, name: str) -> list[str]:
    """The lines between the marks of a table."""
    start, end = _span(page, name)
    return page[start:end].strip().splitlines()


def replaced(page: str, name: str, lines: list[str]) -> str:
    start, end = _span(page, name)
    return page[:start] + "\n".join(lines) + "\n" + page[end:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--processes", type=int, help="as many as there are cores if it is not given")
    given = parser.parse_args()
    for name in given.tables:
        lines = made(name, given.processes)
        print("\n".join(lines), flush=True)
        PAGE.write_text(replaced(PAGE.read_text(), name, lines))
