"""A text in a table is what it says."""

import io
import os

import pytest
from rich.console import Console
from rich.text import Text

from rsotrain.tracking.display import print_closing_table, print_result_table, titled_table

# Closing tags that nothing opens raise in rich's markup; the others vanish or change in it.
NAMES = ["o[/b]", "[red]x[/]", ":smile:", "a\\", "\\[b]", "[link=https://x.y]z[/link]"]


def printed(table: object) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_markup_is_text(name: str) -> None:
    table = titled_table(f"title {name}")
    table.add_column(f"column {name}")
    table.add_column(style="bold")
    table.add_row(f"cell {name}", Text("styled", style="red"))
    text = printed(table)
    for place in ("title", "column", "cell"):
        assert f"{place} {name}" in text
    assert "\x1b[1;31mstyled\x1b[0m" in text  # a style is asked for by a Text


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    table = titled_table("\x1b[2J")
    table.add_column("\x9b1m")
    table.add_row("\u202egpj\n" + os.fsdecode(b"\xff"))
    text = printed(table)
    for shown in (r"\x1b[2J", r"\x9b1m", r"\u202egpj\n\udcff"):
        assert shown in text
    assert "\x1b[2J" not in text


def test_tables_at_the_end_of_a_run_take_any_path(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in NAMES:
        print_closing_table({}, {"run folder": name})
        print_result_table({"model": name, name: 1.0})
    out = capsys.readouterr().out
    assert all(out.count(name) == 3 for name in NAMES)
