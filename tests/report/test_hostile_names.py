"""Names that mean something to rich, matplotlib, HTML, Markdown, a spreadsheet or a terminal are names."""

import csv
import os
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.report_harness import Make, call

from rsotrain.report.comparison import compare
from rsotrain.report.live import runs_table
from rsotrain.report.plots import draw, svg_text
from rsotrain.report.runs import read_runs
from rsotrain.tracking.drawing import stacked_bytes, write_png
from rsotrain.tracking.escaping import for_csv, for_markdown, for_terminal

NAMES = [
    "o[/b]", "[red]x", "$x_1^{2}\\frac$", "$\\undefined$", "_hidden", "=1+1", "a|b `c` *d*", "<script>x()",
    "</text></svg>", "--><!--", "\x1b[2Jclear\x9b1m", "\u202egpj", "a\nb", ":smile:", "#2a78d6",
    'id="text_1"', os.fsdecode(b"\xff\xfe"), "%s {0} {", "日本語 🚢", "&amp;", "'\"",
]  # fmt: skip


class Content(HTMLParser):
    """The text of a page and the elements that may run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.active: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.active.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.active += [tag] if tag == "script" else []
        self.active += [key for key, _ in attrs if key.startswith("on")]


@pytest.fixture
def runs(make: Make) -> Path:
    for i, name in enumerate(NAMES):
        folder = make(name.replace("/", "∕"), 2.0 + i, optimizer__name=name)
    return folder.parent


@pytest.mark.slow
def test_a_report_shows_every_name_as_it_is(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, about labels and letters
        call(runs, "--out", out, "--title", f"<b>{NAMES[0]} `x` {NAMES[10]}")
    shown = [for_terminal(name) for name in NAMES]

    page = (out / "report.html").read_text()
    content = Content(page)
    assert content.active == []
    assert all(content.text.count(name) >= 3 for name in shown)  # table, curves, runs
    assert f"<b>{shown[0]} `x` {shown[10]}" in content.text

    for svg in out.glob("*.svg"):
        texts = "\n".join(ElementTree.parse(svg).getroot().itertext())
        assert all(name in texts for name in shown), svg.name
    assert len(list(out.glob("*.png"))) == 2 * len(list(out.glob("*.svg")))

    with open(out / "report.csv", newline="") as file:
        assert {row["group"] for row in csv.DictReader(file)} == {for_csv(name) for name in NAMES}
    with open(out / "runs.csv", newline="") as file:
        assert {row["group"] for row in csv.DictReader(file)} == {for_csv(name) for name in NAMES}

    document = (out / "report.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("| ")]
    assert {re.split(r"(?<!\\)\|", row)[1].strip() for row in rows[1:]} == set(map(for_markdown, NAMES))
    assert not re.search(r"(?<!\\)<(?!/?(picture|source|img)\b)", document)

    printed = capsys.readouterr().out
    assert all(name in printed for name in shown)
    assert printed.replace("\n", "").isprintable()


def test_the_live_table_does_so_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=160).print(runs_table(read_runs([runs]), 160))
    printed = capsys.readouterr().out
    assert all(for_terminal(name) in printed for name in NAMES)
    assert printed.replace("\n", "").isprintable()


def test_every_group_is_in_the_legend(runs: Path) -> None:
    (legend,) = draw(compare(read_runs([runs])))["validation_loss_by_steps"].legends
    assert [text.get_text() for text in legend.get_texts()] == [for_terminal(name) for name in NAMES]


@pytest.mark.parametrize("name", ["x" * 250, "a " * 125, "^model\\.layers\\.\\d+\\..*proj\\.weight$"])
def test_long_names_leave_room_for_the_pictures(name: str, make: Make) -> None:
    make("a", 2.0, optimizer__block_parameters=name)
    figures = draw(compare(read_runs([make("b", 3.0, optimizer__block_parameters=f"b{name}").parent])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that has no room left
        svg_text("validation_loss_by_steps", figures["validation_loss_by_steps"])
        svg_text("throughput", figures["throughput"])


def test_the_pictures_of_plans_take_any_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_png(stacked_bytes(NAMES, {"weights": [1024.0] * len(NAMES)}), tmp_path / "plan.png")
