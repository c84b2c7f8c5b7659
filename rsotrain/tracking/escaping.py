"""Text that others have written, such as names, paths and values, made harmless: a function for each medium.

rich and matplotlib read markup in text, too. It is switched off where they are set up: in
``tracking.plain_table`` and in the style of ``tracking.drawing``; what they show comes from ``for_terminal``.
"""

import html
import re
from typing import TextIO

# What moves the cursor, turns the reading direction round, ends a line, or is no character in UTF-8 or XML.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
# An underscore between letters or digits is one; so is an ampersand or a colon that names nothing.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$#]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|:(?=[\w+-]+:)")
_LONGEST_WORD, _LONGEST_SENTENCE = 300, 1500  # characters
_FORMULA = tuple("=+-@＝＋－＠")  # what a spreadsheet takes for one, also in full width


def for_terminal(text: object, keep: str = "") -> str:
    r"""``text`` without control characters: an escape sequence is shown as ``\x1b[2J``, a new line as ``\n``.

    ``keep``: those that may stay, such as the line ends of a text that has several. What comes back can be
    encoded in UTF-8, whatever bytes a file's name was made of.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else _shown(found[0]), str(text))


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print ``text`` as one line, on standard output or in ``file``."""
    print(for_terminal(text), file=file, flush=True)


def one_line(sentence: str) -> str:
    """A sentence as it is shown: ``for_terminal``, and what a user gave at length shortened."""
    shown = for_terminal(sentence)
    shown = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _shortened(word[0], _LONGEST_WORD), shown)
    return _shortened(shown, _LONGEST_SENTENCE)


def _shortened(text: str, length: int) -> str:
    """Its begin, which names the key, and its end, which has the advice."""
    if len(text) <= length:
        return text
    return f"{text[: length * 2 // 3]} […] {text[-length // 4 :]}"


def for_html(text: object) -> str:
    """For an element's content or a quoted attribute."""
    return html.escape(for_terminal(text))


def for_markdown(text: object) -> str:
    """For a line of a paragraph, a heading or a cell of a table: no markup, HTML, link or formula."""
    return _MARKDOWN.sub(r"\\\g<0>", for_terminal(text))


def markdown_code(text: object) -> str:
    """A code span, which no backtick in ``text`` ends; not for the cell of a table, where a ``|`` would."""
    shown = for_terminal(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def for_latex(text: object) -> str:
    """For a cell of a LaTeX table: no command, formula, comment or new cell."""
    return "".join(_LATEX.get(character, character) for character in for_terminal(text))


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
}  # fmt: skip


def for_csv(text: object) -> str:
    """For a cell of a CSV file: no spreadsheet takes it for a formula; a number stays one."""
    shown = for_terminal(text)
    if shown.lstrip().startswith(_FORMULA) and not _is_number(shown):
        return f"'{shown}"
    return shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
