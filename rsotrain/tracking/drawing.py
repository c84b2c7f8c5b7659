"""What all pictures of a report share: matplotlib, its style in a palette, the looks of groups, ticks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rsotrain.errors import UserError
from rsotrain.tracking.display import format_bytes, format_count, format_seconds
from rsotrain.tracking.theme import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.6  # inches
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # more groups than colours


def import_matplotlib() -> None:
    """Raise UserError where matplotlib is missing; it is an extra, since training needs no pictures."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install 'rsotrain[report]'") from error


@contextmanager
def drawing_in(palette: Palette, **more: Any) -> Iterator[None]:
    """Drawing and saving both need it: matplotlib makes some ticks only when it saves."""
    import_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_style(palette) | more):
        yield


def _style(palette: Palette) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "svg.fonttype": "none",  # text stays text
        "text.color": palette.ink,
        "axes.facecolor": palette.surface,
        "axes.edgecolor": palette.grid,
        "axes.labelcolor": palette.muted,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": palette.grid,
        "grid.linewidth": 0.8,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
    }


def new_figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def look(index: int, palette: Palette) -> dict[str, Any]:
    """Colour first; where there are more groups than colours, the dashes tell."""
    colors = palette.series
    return {"color": colors[index % len(colors)], "linestyle": DASHES[index // len(colors) % len(DASHES)]}


def count_tick(count: float, _: float = 0) -> str:
    """500, 1.5k, 20k."""
    return _without_zeros(format_count(count)) if count else "0"


def bytes_tick(count: float, _: float = 0) -> str:
    return _without_zeros(format_bytes(count)) if count else "0"


def seconds_tick(seconds: float, _: float = 0) -> str:
    return format_seconds(seconds) if seconds else "0"


def _without_zeros(text: str) -> str:
    """``1.50k`` as ``1.5k``, ``20.0 MiB`` as ``20 MiB``."""
    return re.sub(r"\.(\d*?)0+(?=\D|$)", lambda match: f".{match[1]}" if match[1] else "", text)
