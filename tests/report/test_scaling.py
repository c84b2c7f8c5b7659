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
    make: Make,
    name: str,
    exponent: float,
    *,
    seeds: int = 1,
    widths: tuple[int, ...] = WIDTHS,
    **more: object,
) -> Path:
    for width in widths:
        for seed in range(seeds):
            loss = loss_of(width, exponent)
            own = {"optimizer__name": name, "seed": seed, **model(width), **more}
            folder = make(f"{name}{width}_{seed}_{'_'.join(map(str, more.values()))}", loss, **own)
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


def test_each_size_has_the_best_of_its_rates_after_as_many_tokens(make: Make) -> None:
    folder = runs_of(make, "adam", 0.1)
    make("better", 1.5, optimizer__lr=0.5, **model(128))
    make("worse", 5.0, optimizer__lr=0.7, **model(256))
    make("other", 3.5, optimizer__lr=0.5, **model(64))
    make("longer", 1.0, steps=80, metrics={"tokens": lambda step: 200 * step}, **model(64))
    (line,) = lines(folder).values()
    assert [size.loss.mean for size in line.sizes] == pytest.approx([loss_of(64), 1.5, loss_of(256)])
    assert [size.tokens for size in line.sizes] == [4000] * 3


def test_other_settings_are_other_lines_and_few_sizes_are_none(make: Make) -> None:
    runs_of(make, "adam", 0.1)
    folder = runs_of(make, "carry", 0.1, widths=WIDTHS[:2])
    make("other", 1.0, optimizer__name="carry", grad_clip=1.0, **model(256))
    assert list(lines(folder)) == ["adam"]
    make("diverged", 1.0, optimizer__name="lion", metrics={"val/loss": math.inf}, **model(256))
    runs_of(make, "lion", 0.1, widths=WIDTHS[:2])
    assert list(lines(folder)) == ["adam"]
    assert lines_of(compare(read_runs([folder]), ["optimizer.name"])) == []  # groups of several sizes


def test_a_rank_is_a_share_of_the_hidden_size(make: Make) -> None:
    for width in WIDTHS:
        folder = make(f"g{width}", loss_of(width), optimizer__name="galore", optimizer__rank=width // 4,
                      **model(width)).parent  # fmt: skip
    make("g_half", 1.0, optimizer__name="galore", optimizer__rank=0.5, **model(64))
    assert list(lines(folder)) == ["galore"]


def test_adam_is_that_of_the_same_job(make: Make) -> None:
    """Neither of other data nor of another precision."""
    runs_of(make, "adam", 0.1, precision="fp32")
    runs_of(make, "carry", 0.12, precision="bf16_mixed")
    folder = runs_of(make, "lion", 0.09, precision="fp32", data__name="c4")
    found = lines_of(compare(read_runs([folder]), mixed=True))
    assert [line.method for line in found] == ["carry", "adam", "lion"]
    assert {line.name[-3:] for line in found} == {"[a]", "[b]"}
    assert not any("%" in cell for _, cells in scaling_cells(found)[1] for cell in cells)


@pytest.mark.parametrize(("loss", "shown"), [(2000.0, "+inf %"), (1e50, "+inf %")])
def test_a_loss_of_any_size_costs_no_report(make: Make, loss: float, shown: str) -> None:
    runs_of(make, "adam", 0.1)
    for width in WIDTHS:
        folder = make(f"c{width}", loss, optimizer__name="carry", **model(width)).parent
    found = lines_of(compare(read_runs([folder])))
    assert shown in scaling_cells(found)[1][-1][1][0]
    assert found[-1].law(20 * 64**2) == pytest.approx(loss)


def test_sizes_that_lie_close_together_have_a_law(make: Make) -> None:
    for size, loss in ((1000, 3.0), (1001, 4.0), (1002, 6.0)):
        folder = make(f"i{size}", loss, **model(64) | {"model__intermediate_size": size}).parent
    (line,) = lines(folder).values()
    assert 2.5 < line.law(line.sizes[0].parameters) < 3.5


@pytest.mark.parametrize(
    "odd",
    [
        {"num_attention_heads": 0.5},
        {"num_key_value_heads": -100},
        {"head_dim": -5},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 0},
        {"intermediate_size": [1]},
    ],
)
def test_a_size_that_makes_no_sense_is_none(odd: dict[str, object]) -> None:
    config = {key.replace("__", "."): value for key, value in model(64).items()}
    assert block_parameters(config) == 20 * 64**2
    assert block_parameters(config | {f"model.{key}": value for key, value in odd.items()}) is None


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
