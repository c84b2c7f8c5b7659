"""What all pictures of a report share: matplotlib, its style in a palette, the looks of groups, ticks."""

import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsotrain.errors import UserError
from rsotrain.tracking.escaping import for_terminal
from rsotrain.tracking.formats import format_bytes, format_count, format_seconds
from rsotrain.tracking.theme import LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.4  # inches; shown on a phone, 370 pixels wide, a picture has letters of 10
BAR_LABEL_WIDTH = 22  # characters
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_SOLID = 5  # groups that have one kind of dashes before the next one begins


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

    with matplotlib.rc_context(_style(palette) | more), warnings.catch_warnings():
        # a letter that the font lacks is a box in the PNG; the SVG's are the browser's
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        yield


def _style(palette: Palette) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 12,
        "text.parse_math": False,  # names of settings and runs have dollars in them
        "text.usetex": False,
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


def label(text: str, width: int, lines: int) -> str:
    """A name as a picture shows it: in lines of ``width`` characters, cut after so many of them."""
    return textwrap.fill(for_terminal(text), width, max_lines=lines, placeholder="…")


def new_figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def look(index: int, palette: Palette) -> dict[str, Any]:
    """A colour for each of ten groups, and other dashes from five to five."""
    color, dashes = color_and_dashes(index)
    return {"color": palette.series[color], "linestyle": DASHES[dashes]}


def color_and_dashes(index: int) -> tuple[int, int]:
    """Which of a palette's colours, and which of ``DASHES``, a group has: the same for no two of forty."""
    number = len(LIGHT.series)
    kind = index // _SOLID + index // (number * len(DASHES) // 2)
    return index % number, kind % len(DASHES)


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


def write_png(figure: "Figure", path: Path, palette: Palette = LIGHT) -> None:
    """``palette``: the one it was drawn in."""
    with drawing_in(palette):
        figure.savefig(path, dpi=160, facecolor=palette.surface)


def stacked_bytes(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], palette: Palette = LIGHT
) -> "Figure":
    """A horizontal bar of bytes for each name, the first on top, made of ``parts``; at least one byte."""
    with drawing_in(palette):
        figure, panel, places = horizontal_bars(names, palette)
        left = [0.0] * len(names)
        for (part, widths), color in zip(parts.items(), palette.parts, strict=False):
            panel.barh(
                places, widths, left=left, height=0.62, color=color, edgecolor=palette.surface, linewidth=1.2,
                label=part,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, total in zip(places, left, strict=True):
            panel.annotate(
                format_bytes(total), (total, place), (5, 0), textcoords="offset points", va="center"
            )
        panel.set_xlim(right=1.12 * max(left))
        bytes_axis(panel, max(left))
        figure.legend(
            loc="outside upper left", ncols=min(3, len(parts)), handlelength=1.0, handleheight=1.0,
            columnspacing=1.4,
        )  # fmt: skip
    return figure


def bytes_axis(panel: "Axes", most: float) -> None:
    """Ticks at round numbers of bytes along x, up to ``most``; at least one byte."""
    from matplotlib.ticker import MultipleLocator

    unit = 1024 ** min(4, int(math.log(most, 1024)))
    panel.xaxis.set_major_locator(MultipleLocator(_round_step(most / unit) * unit))
    panel.xaxis.set_major_formatter(bytes_tick)


def horizontal_bars(names: Sequence[str], palette: Palette) -> tuple["Figure", "Axes", list[int]]:
    """An empty picture of horizontal bars, the first name on top."""
    labels = [label(name, BAR_LABEL_WIDTH, 3) for name in names]
    lines = sum(max(1.5, 1 + text.count("\n")) for text in labels)
    figure = new_figure(0.25 * lines + 1.6)
    panel = figure.subplots()
    places = list(range(len(names)))
    panel.set_yticks(places, labels, color=palette.ink)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    return figure, panel, places


def _round_step(length: float) -> float:
    """1, 2 or 5 times a power of ten, so that at most four steps fill ``length``: room for "500 MiB" each."""
    power = 10.0 ** math.floor(math.log10(length / 4))
    return next(factor * power for factor in (1, 2, 5, 10) if 4 * factor * power >= length)
