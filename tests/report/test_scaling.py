"""Loss against model size: which runs are a line, its law, the advantage over Adam, and the tables."""

import csv
import math
from pathlib import Path

import pytest
from helpers.report_harness import Make, call
from helpers.runs import compose

from rsotrain.config.keys import flatten, plain
from rsotrain.models.build import model_without_memory
from rsotrain.report.comparison import compare
from rsotrain.report.runs import read_runs
from rsotrain.report.scaling import Line, block_parameters, lines_of, scaling_cells

WIDTHS = (64, 128, 256)


def model(width: int) -> dict[str, object]:
    """Of 4·width² + 3·2·width² weights a layer."""
    return {
        "model__name": f"w{width}", "model__hidden_size": width, "model__intermediate_size": 2 * width,
        "model__num_hidden_layers": 2, "model__num_attention_heads": 4,
    }  # fmt: skip


def loss_of(width: int, exponent: float = 0.1) -> float:
    return 9.0 * (20.0 * width**2) ** -exponent


def runs_of(
    make: Make, name: str, exponent: float, *, seeds: int = 1, widths: tuple[int, ...] = WIDTHS
) -> Path:
    for width in widths:
        for seed in range(seeds):
            loss = loss_of(width, exponent)
            own = {"optimizer__name": name, "seed": seed, **model(width)}
            folder = make(f"{name}{width}_{seed}", loss, **own)
    return folder.parent


def lines(folder: Path) -> dict[str, Line]:
    return {line.name: line for line in lines_of(compare(read_runs([folder])))}


def test_a_line_has_its_power_law_and_its_advantage(make: Make) -> None:
    runs_of(make, "adam", 0.1)
    found = lines(runs_of(make, "carry", 0.12))
    assert list(found) == ["carry", "adam"]  # the best at the largest size first
    assert [line.exponent for line in found.values()] == pytest.approx([0.12, 0.1])
    assert found["adam"].law(20 * 64**2) == pytest.approx(loss_of(64))
    assert [size.parameters for size in found["adam"].sizes] == [20 * width**2 for width in WIDTHS]
    heads, rows = scaling_cells(list(found.values()))
    assert heads == ["81.9k", "328k", "1.31M", "b"]
    assert rows[0][1][0] == f"{4000 / 81920:.3g}"  # tokens
    change = 100 * math.expm1(loss_of(256, 0.12) - loss_of(256, 0.1))
    assert rows[1][1][2].endswith(f"({change:+.1f} %)")
    assert "(" not in rows[2][1][2]


def test_each_size_has_the_best_of_its_rates(make: Make) -> None:
    folder = runs_of(make, "adam", 0.1)
    make("better", 1.5, optimizer__lr=0.5, steps=80, **model(128))
    make("worse", 5.0, optimizer__lr=0.7, **model(256))
    (line,) = lines(folder).values()
    assert [size.loss.mean for size in line.sizes] == pytest.approx([loss_of(64), 1.5, loss_of(256)])


def test_other_settings_are_other_lines_and_few_sizes_are_none(make: Make) -> None:
    runs_of(make, "adam", 0.1)
    folder = runs_of(make, "carry", 0.1, widths=WIDTHS[:2])
    make("other", 1.0, optimizer__name="carry", grad_clip=1.0, **model(256))
    assert list(lines(folder)) == ["adam"]
    make("diverged", 1.0, optimizer__name="lion", metrics={"val/loss": math.inf}, **model(256))
    runs_of(make, "lion", 0.1, widths=WIDTHS[:2])
    assert list(lines(folder)) == ["adam"]


@pytest.mark.parametrize("size", ["llama_9m", "llama_60m"])
@pytest.mark.parametrize("more", [[], ["model.num_key_value_heads=2"], ["model.head_dim=8"]])
def test_the_number_of_block_weights_is_the_models(size: str, more: list[str]) -> None:
    config = compose([f"model={size}", *more])
    blocks = model_without_memory(config.model, 300).get_submodule("model.layers")
    expected = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert block_parameters(dict(flatten(plain(config)))) == expected
    assert block_parameters({"model.hidden_size": 64}) is None


def test_a_report_has_the_picture_and_the_tables(make: Make, tmp_path: Path) -> None:
    runs_of(make, "adam", 0.1, seeds=2)
    folder = runs_of(make, "carry", 0.12, seeds=2)
    out = tmp_path / "out"
    call(folder, "--out", out)
    with open(out / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["seeds"] for row in rows} == {"2"}
    assert float(rows[0]["law"]) == pytest.approx(loss_of(64, 0.12))
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "| carry |" in (out / "report.md").read_text()
    assert "Loss against model size" in (out / "report.html").read_text()
