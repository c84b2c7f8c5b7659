"""The one kind of table that the screen shows. It imports rich, so import it where a table is made."""

from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from rsotrain.tracking.escaping import for_terminal


class PlainTable(Table):
    """A table in which a ``str`` is what it says: neither markup, nor emoji codes, nor control characters.

    Names of runs and paths go into it as they are. What is to have a style is a ``rich.text.Text``.
    """

    def __init__(self, title: str) -> None:
        super().__init__(
            title=Text(for_terminal(title), style="bold") if title else None,
            box=ROUNDED,
            title_justify="left",
        )

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        super().add_column(_literal(header), *arguments, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_literal, cells), **options)


def _literal(cell: Any) -> Any:
    return Text(for_terminal(cell)) if isinstance(cell, str) else cell
