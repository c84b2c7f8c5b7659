"""The live breakdown of a run, and the tables of the plan in rsotrain/planner/README.md."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.command import ROOT
from helpers.runs import compose
from torch.multiprocessing.reductions import StorageWeakRef

from rsotrain.instruments.memory import saved_activation_bytes
from rsotrain.models.build import build_model
from rsotrain.running.mode import train

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import memory_tables

PARTS = ("parameters", "gradients", "optimizer_state", "saved_activations", "peak")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "gap", "between"),
    [("galore", 3, [7]), ("rso_pca", 3, [7]), ("galore", 1, []), ("adam", None, [])],
)
def test_memory_is_logged_when_bases_are_new(
    optimizer: str,
    gap: int | None,
    between: list[int],
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At steps 1, 4, 7 for a gap of 3; step 4 has a line anyway, and a gap below log_every adds none."""
    given = [o for o in tiny if not o.startswith(("steps=", "log_every=", "save_every="))]
    gaps = [] if gap is None else [f"optimizer.update_proj_gap={gap}"]
    own = ["steps=8", "log_every=2", f"optimizer={optimizer}", f"output_dir={tmp_path}"]
    train(compose([*given, *own, *gaps]))
    (file,) = tmp_path.glob("*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records = [record for record in records if "memory/peak_bytes" in record]
    assert [record["step"] for record in records] == sorted([1, 2, 4, 6, 8, *between])
    for record in records:
        assert all(record[f"memory/{part}_bytes"] > 0 for part in PARTS)
    shown = capsys.readouterr().out
    assert shown.count("memory: weights") == len(between)
    assert "saved activations" in shown  # of the closing table


# --- the page ------------------------------------------------------------------------------------------


def table(name: str) -> list[str]:
    return memory_tables.table_in(memory_tables.PAGE.read_text(), name)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "optimizer", "ranks"), [("60m", "adam", 1), ("60m", "rso", 8)])
def test_some_of_the_pages_cells_are_the_plans(model: str, optimizer: str, ranks: int) -> None:
    (row,) = (
        line for line in table("one GPU" if ranks == 1 else f"{ranks} GPUs") if f"`{optimizer}`" in line
    )
    cells = [cell.strip() for cell in row.split("|")[2:]]
    assert cells[memory_tables.MODELS.index(model)] == memory_tables.cell(model, optimizer, ranks)


def test_the_pages_tables_are_whole_and_rso_is_first() -> None:
    for name in ("one GPU", "8 GPUs"):
        head, _, *rows = table(name)
        assert head == f"| {name} | {' | '.join(memory_tables.MODELS)} |"
        assert [line.split("|")[1].strip(" `") for line in rows] == list(memory_tables.OPTIMIZERS)
    for name in ("largest", "largest, 8 bits"):
        largest = [line.split("|") for line in table(name)[2:]]
        assert largest[0][1].strip() == "`rso`"
        assert {row[1].strip(" `") for row in largest} == set(memory_tables.LARGEST_OPTIMIZERS)
        parameters = [float(row[3].split()[0]) for row in largest]
        assert parameters == sorted(parameters, reverse=True)
        assert parameters[0] > parameters[1]
    assert parameters[0] > 7.0
    _, _, *rows = table("in backward")
    assert [line.split("|")[1].strip(" `") for line in rows] == list(memory_tables.OPTIMIZERS)


def test_no_peak_is_a_tenth_above_its_floor_but_where_all_grams_are_held_at_once() -> None:
    _, _, *rows = table("floor")
    above = {row.split("|")[1].strip(" `"): float(row.split("|")[3].strip(" %")) for row in rows}
    assert list(above) == sorted(memory_tables.FLOORS)
    assert [name for name, percent in above.items() if percent > 10.0] == ["rso_pca"]


def test_with_lean_settings_rso_takes_least() -> None:
    head, _, *rows = table("8 bits")
    peaks = {row.split("|")[1].strip(" `"): [float(cell) for cell in row.split("|")[2:-1]] for row in rows}
    assert list(peaks) == list(memory_tables.OPTIMIZERS)
    for column in range(head.count("|") - 2):
        assert min(peaks, key=lambda name: peaks[name][column]) == "rso"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", memory_tables.TABLES)
def test_the_pages_tables_are_the_plans(name: str) -> None:
    assert memory_tables.made(name) == table(name)


# --- counting keeps nothing alive ------------------------------------------------------------------------


def test_counting_does_not_keep_what_the_backward_pass_frees() -> None:
    """Storages alive as the backward pass reaches each layer, from the last to the first: fewer each time."""
    config = compose(["model=llama_tiny", "model.num_hidden_layers=4", "optimizer=adam"])
    model = build_model(
        config.model, vocab_size=64, precision=config.precision, device=torch.device("cpu"), seed=0
    )
    kept: list[StorageWeakRef] = []
    alive: list[int] = []
    handles = [
        layer.register_full_backward_pre_hook(
            lambda *_: alive.append(sum(not reference.expired() for reference in kept))
        )
        for layer in model.model.layers
    ]
    tokens = torch.arange(32).view(2, 16)
    with saved_activation_bytes(
        model.parameters(), lambda t: kept.append(StorageWeakRef(t.untyped_storage()))
    ):
        loss = model(tokens, tokens)
    assert len(kept) > 8
    loss.backward()
    assert len(alive) == len(handles)
    assert all(later < earlier for earlier, later in itertools.pairwise(alive)), alive
    assert alive[-1] <= 0.5 * alive[0]
