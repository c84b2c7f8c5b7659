"""Loss against optimizer state: the front, the test against Adam, and the tables."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.report_harness import Make, call

from rsotrain.report.comparison import compare
from rsotrain.report.front import STATE, Row, front_of, p_of_differences, student_p
from rsotrain.report.runs import read_runs


def method(make: Make, name: str, state: float, losses: list[float], **settings: Any) -> list[Path]:
    """A run a seed of an optimizer with so many bytes of state."""
    return [
        make(f"{name}{seed}", loss, seed=seed, optimizer__name=name, metrics={STATE: state}, **settings)
        for seed, loss in enumerate(losses)
    ]


@pytest.fixture
def folders(make: Make) -> list[Path]:
    """Two that nothing smaller beats (good, free), one in vain (vain), and Adam."""
    return [
        *method(make, "adam", 1000, [2.0, 2.1, 2.2]),
        *method(make, "good", 500, [1.9, 2.0, 2.1]),
        *method(make, "vain", 500, [2.5, 2.6, 2.7]),
        *method(make, "free", 0, [2.4, 2.2, 2.6]),
    ]


def rows(*folders: Path) -> dict[str, Row]:
    return {row.group.label: row for row in front_of(compare(read_runs(folders), mixed=True))}


def test_the_front_the_shares_and_the_intervals(folders: list[Path]) -> None:
    found = rows(*folders)
    assert list(found) == ["adam", "good", "vain", "free"]  # the largest state first
    assert [row.on_front for row in found.values()] == [False, True, False, True]
    assert [row.share for row in found.values()] == [1.0, 0.5, 0.5, 0.0]
    assert found["adam"].p is None
    assert found["good"].p == 0.0  # 0.1 lower with each seed
    assert found["free"].p == pytest.approx(p_of_differences([0.4, 0.1, 0.4]))
    # Student's t with two degrees of freedom: 4.303 · 0.1 / √3
    assert found["adam"].loss.margin == pytest.approx(4.303 * 0.1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    # quantiles of printed tables of Student's t, four or five digits
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (2.353, 3, 0.1), (3.747, 4, 0.02), (4.032, 5, 0.01), 
     (2.228, 10, 0.05), (2.042, 30, 0.05), (0.0, 3, 1.0)],
)  # fmt: skip
def test_the_p_of_students_t(t: float, freedom: int, p: float) -> None:
    assert student_p(t, freedom) == pytest.approx(p, rel=1e-3)  # as exact as the tables
    assert student_p(-t, freedom) == student_p(t, freedom)


def test_the_p_of_differences_at_its_ends() -> None:
    assert p_of_differences([0.3]) is None
    assert p_of_differences([0.25, 0.25]) == 0.0
    assert p_of_differences([0.0, 0.0]) == 1.0


def test_no_p_where_seeds_or_jobs_are_others(make: Make) -> None:
    found = rows(
        *method(make, "adam", 1000, [2.0, 2.1]),
        *method(make, "one", 500, [1.9]),
        *method(make, "slow", 400, [1.9, 2.0], grad_clip=1.0),
        *method(make, "like", 300, [1.9, 2.0]),
    )
    assert found["one"].p is None
    assert found["one"].loss.margin is None
    assert next(row.p for label, row in found.items() if label.startswith("slow")) is None
    assert found["like"].p == 0.0


def test_without_adam_there_are_no_shares_and_a_failed_group_is_left_out(make: Make) -> None:
    failed = make("f", optimizer__name="f", finished=False, record={"state": "failed"}, metrics={STATE: 1})
    found = rows(*(method(make, n, s, [2.0])[0] for n, s in (("a", 5), ("b", 6), ("c", 7))), failed)
    assert list(found) == ["c", "b", "a"]
    assert all(row.share is None and row.p is None for row in found.values())


@pytest.mark.parametrize(
    "change", [{"steps": 80}, {"seq_len": 64}, {"batch_size": 3}], ids=["steps", "data", "batch"]
)
def test_no_front_of_losses_that_mean_different_things(make: Make, change: dict[str, int]) -> None:
    of_a, of_b = method(make, "a", 5, [2.0]), method(make, "b", 6, [2.0])
    assert rows(*of_a, *of_b, *method(make, "c", 7, [2.0], **change)) == {}


def test_no_front_of_few_groups_or_of_equal_states(make: Make) -> None:
    of_a, of_b = method(make, "a", 5, [2.0]), method(make, "b", 6, [2.0])
    assert rows(*of_a, *of_b) == {}
    assert rows(*of_a, *method(make, "d", 5, [2.1]), *method(make, "e", 5, [2.2])) == {}


@pytest.mark.slow
def test_the_report_has_picture_page_and_tables(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    call(*folders, "--out", out)
    assert all((out / f"front{end}").stat().st_size > 1000 for end in (".png", "_dark.png", ".svg"))
    page = (out / "report.html").read_text()
    assert "<h2>Loss against optimizer state</h2>" in page
    assert "• good</th><td>500 B</td><td>50.0 %</td><td>2.0000 ± 0.2484</td><td>3</td><td>&lt; 0.001" in page
    text = (out / "report.md").read_text()
    assert "| • **good** | 500 B | 50.0 % | 2.0000 ± 0.2484 | 3 | \\< 0.001 | 4.88 KiB | 20.0 s |" in text
    assert "not corrected for the number of comparisons" in text
    latex = (out / "front.tex").read_text()
    assert (
        r"\textbf{good} & 500 B & 50.0 \% & 2.0000 $\pm$ 0.2484 & 3 & $<$ 0.001 & 4.88 KiB & 20.0 s \\"
        in latex
    )
    with open(out / "front.csv", newline="") as file:
        table = {row["group"]: row for row in csv.DictReader(file)}
    assert [table[name]["on front"] for name in ("adam", "good", "vain", "free")] == ["0", "1", "0", "1"]
    assert float(table["vain"]["share of adam"]) == 0.5
    assert table["adam"]["p against adam"] == ""


@pytest.mark.slow
def test_a_hostile_name_stays_text_in_latex(make: Make, tmp_path: Path) -> None:
    names = ["a_b", r"\input{x}", "50%&$#^~"]
    all_of = [make(f"r{i}", optimizer__name=name, metrics={STATE: 10 * i}) for i, name in enumerate(names)]
    call(*all_of, "--out", tmp_path / "report")
    latex = (tmp_path / "report/front.tex").read_text()
    assert r"a\_b" in latex
    assert r"\textbackslash{}input\{x\}" in latex
    assert r"50\%\&\$\#\textasciicircum{}\textasciitilde{}" in latex
