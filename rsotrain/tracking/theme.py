"""Colours of pictures and page. Pictures are drawn in the light ones; a page swaps in variables for both."""

import re
from typing import NamedTuple

# name -> (light, dark). Hues of a series keep their order under the common colour deficiencies.
COLORS = {
    "surface": ("#ffffff", "#17191c"),
    "ink": ("#1b1f24", "#e9ecef"),
    "muted": ("#5c6670", "#9aa4ae"),
    "grid": ("#e3e7eb", "#30363d"),
    "series-1": ("#2a78d6", "#4c97ec"),
    "series-2": ("#eb6834", "#e5713f"),
    "series-3": ("#1baf7a", "#27b483"),
    "series-4": ("#eda100", "#d69a1c"),
    "series-5": ("#4a3aa7", "#9b90ee"),
    "series-6": ("#c4263a", "#d8434f"),
    "series-7": ("#e87ba4", "#dd6a97"),
    "series-8": ("#008300", "#3fa63f"),
    "series-9": ("#7b4f2c", "#b98a62"),
    "series-10": ("#5f6b76", "#aeb8c2"),
    "part-1": ("#184f95", "#2f6fc0"),
    "part-2": ("#3a87e4", "#6aa6ef"),
    "part-3": ("#86b6ef", "#a9cbf6"),
    "part-4": ("#c3daf7", "#dbe9fc"),
    "part-5": ("#f2b866", "#c98f3d"),
    "part-6": ("#d3d8de", "#59626c"),
}


SVG_TAG = re.compile(r"<[^>]*>")  # matplotlib escapes both brackets wherever they are text


class Palette(NamedTuple):
    """What matplotlib draws with. ``series``: of groups; ``parts``: of the pieces of a bar."""

    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    parts: tuple[str, ...]


def _palette(dark: bool) -> Palette:
    one = {name: pair[dark] for name, pair in COLORS.items()}
    series, parts = (
        tuple(color for name, color in one.items() if name.startswith(f"{kind}-"))
        for kind in ("series", "part")
    )
    return Palette(one["surface"], one["ink"], one["muted"], one["grid"], series, parts)


LIGHT, DARK = _palette(dark=False), _palette(dark=True)


def variables(dark: bool) -> str:
    """The colours as declarations of CSS variables."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in COLORS.items())


def with_variables(svg: str) -> str:
    """A picture drawn in the light colours, its colours now those of the page around it.

    What it says stays, be it the name of a colour.
    """

    def recolored(tag: re.Match[str]) -> str:
        text = tag[0]
        for name, (light, _) in COLORS.items():
            text = text.replace(light, f"var(--{name})")
        return text

    return SVG_TAG.sub(recolored, svg)
