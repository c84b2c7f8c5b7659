"""The pictures of a report."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsotrain.report.bars import mean_of, memory_bars, throughput_bars
from rsotrain.report.comparison import THROUGHPUT, Group
from rsotrain.report.curves import AXES, curves
from rsotrain.report.front import front_of, front_picture
from rsotrain.report.scaling import lines_of, scaling_picture
from rsotrain.tracking.drawing import drawing_in
from rsotrain.tracking.theme import LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = (
    ("val/loss", "validation_loss", "validation loss (nats per token)"),
    ("train/loss", "training_loss", "training loss (nats per token)"),
)
SUBSPACE = (
    ("subspace/overlap", "overlap with the basis before"),
    ("subspace/captured_energy", "captured share of the energy"),
)


def draw(groups: Sequence[Group], palette: Palette = LIGHT) -> dict[str, "Figure"]:
    """File name -> picture, of what the runs have recorded, in the order of a page.

    Raises UserError where matplotlib is missing.
    """
    figures: dict[str, Figure] = {}
    with drawing_in(palette):
        for metric, name, label in LOSSES:
            if _has(groups, metric):
                for axis in AXES:
                    figures[f"{name}_by_{axis.name}"] = curves(groups, [(metric, label)], axis, palette)
        if front := front_of(groups):
            figures["front"] = front_picture(front, palette)
        if lines := lines_of(groups):
            figures["scaling"] = scaling_picture(lines, palette)
        if any(mean_of(group, "memory/parameters_bytes") for group in groups):
            figures["memory"] = memory_bars(groups, palette)
        if any(mean_of(group, THROUGHPUT.metric) for group in groups):
            figures["throughput"] = throughput_bars(groups, palette)
        if panels := [(metric, label) for metric, label in SUBSPACE if _has(groups, metric)]:
            seen = [group for group in groups if any(_has([group], metric) for metric, _ in panels)]
            figures["subspace"] = curves(groups, panels, AXES[1], palette, shown=seen, stairs=True)
    return figures


def _has(groups: Sequence[Group], metric: str) -> bool:
    return any(run.series(metric) for group in groups for run in group.runs)


def svg_text(name: str, figure: "Figure") -> str:
    """The picture, drawn in the light palette, as an SVG element; the same runs give the same text."""
    buffer = io.StringIO()
    with drawing_in(LIGHT, **{"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor=LIGHT.surface, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
