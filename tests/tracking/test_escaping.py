"""What each medium is told of hostile text."""

import html
import io

import pytest

from rsotrain.tracking.escaping import (
    for_csv,
    for_html,
    for_markdown,
    for_terminal,
    markdown_code,
    print_line,
)


def test_control_characters_are_shown_and_do_nothing() -> None:
    text = "a\x1b[2J\x9b1m\x07\x7f\r\nb\u202egpj.exe\u2066\u200f\u2028\udcff\ufffe"
    shown = for_terminal(text)
    assert shown == r"a\x1b[2J\x9b1m\x07\x7f\r\nb\u202egpj.exe\u2066\u200f\u2028\udcff\ufffe"
    shown.encode()
    assert for_terminal("two\nlines\tand \x1b", keep="\n\t") == "two\nlines\tand \\x1b"
    assert for_terminal(3.5) == "3.5"


def test_letters_of_all_scripts_stay() -> None:
    text = "Größe 日本語 עברית हिन्दी 👩\u200d🔬 a_b [x] $y$ \\d"
    assert for_terminal(text) == text


def test_a_printed_line_is_one_line() -> None:
    file = io.StringIO()
    print_line("a\nrsotrain: all is well\x1b[1A", file)
    assert file.getvalue() == "a\\nrsotrain: all is well\\x1b[1A\n"


def test_html_shows_what_was_written() -> None:
    text = "<script>alert('&amp;')</script>\" onclick=\"x"
    assert html.unescape(for_html(text)) == text
    assert not set("<>\"'") & set(for_html(text))
    assert for_html("\x1b") == r"\x1b"


# What GitHub-flavoured Markdown escapes: a backslash before a punctuation mark. Unescaping gives the text.
@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("galore svd rank=64", "galore svd rank=64"),
        ("optimizer.block_parameters", "optimizer.block_parameters"),  # no emphasis within a word
        ("_a_ __b__", r"\_a\_ \_\_b\_\_"),
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("[x](javascript:alert(1))", r"\[x\](javascript:alert(1))"),
        ("![x](y)", r"!\[x\](y)"),
        ("<javascript:alert(1)>", r"\<javascript:alert(1)\>"),
        ("`a` *b* ~~c~~ $d$ #1", r"\`a\` \*b\* \~\~c\~\~ \$d\$ \#1"),
        ("&lt;b&gt; A & B", r"\&lt;b\&gt; A & B"),
        (":smile: 12:30", r"\:smile: 12:30"),
        ("a\n| b |\n# c", r"a\\n\| b \|\\n\# c"),
        ("\\", r"\\"),
    ],
)
def test_markdown_means_nothing(text: str, escaped: str) -> None:
    assert for_markdown(text) == escaped


def test_a_code_span_ends_where_it_should() -> None:
    assert markdown_code("rsotrain-report a") == "`rsotrain-report a`"
    assert markdown_code("a `b` c") == "``a `b` c``"
    assert markdown_code("`a``") == "``` `a`` ```"
    assert markdown_code("a\n\n# b") == r"`a\n\n# b`"


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", " =1", "＝1", "-", "-inf+1"]
)
def test_a_formula_is_text_to_a_spreadsheet(text: str) -> None:
    assert for_csv(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-5", "+1e-3", "-0.25", "a=1", "", "3"])
def test_numbers_and_other_text_stay(text: str) -> None:
    assert for_csv(text) == text


def test_a_cell_is_one_line() -> None:
    assert for_csv("\t=1\r\n") == r"\t=1\r\n"
