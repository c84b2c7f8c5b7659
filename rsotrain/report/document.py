"""The report as a Markdown page: table, claims and pictures, as a repository shows it."""

from collections.abc import Collection, Sequence

from rsotrain.report.claims import RULE, Finding
from rsotrain.report.comparison import Group
from rsotrain.report.front import NOTE as FRONT_NOTE
from rsotrain.report.front import front_markdown, front_of
from rsotrain.report.scaling import NOTE as SCALING_NOTE
from rsotrain.report.scaling import lines_of, scaling_markdown
from rsotrain.report.tables import markdown
from rsotrain.tracking.escaping import for_markdown, markdown_code

# file name of a picture -> what it shows; the other pictures are on the HTML page
PICTURES = {
    "validation_loss_by_tokens": "Validation loss over tokens",
    "validation_loss_by_time": "Validation loss over wall time",
    "front": "Loss against optimizer state",
    "scaling": "Loss against model size",
    "memory": "Memory by part",
    "throughput": "Throughput",
    "subspace": "Overlap of adjacent bases, and the share of the gradient's energy that they capture",
}


def document(
    groups: Sequence[Group],
    findings: Sequence[Finding],
    pictures: Collection[str],
    title: str,
    command: str,
    left_out: Sequence[str] = (),
) -> str:
    """The page. ``pictures``: names of PNG files beside it, each in a light and a dark one.

    ``left_out``: sentences about other runs.
    """
    parts = [f"# {for_markdown(title)}", markdown(groups).rstrip()]
    if left_out:
        parts.append("\n".join(f"- {for_markdown(sentence)}" for sentence in left_out))
    if findings:
        parts += ["## The papers' claims", claims_table(findings), RULE]
    for name, what in PICTURES.items():
        if name in pictures:
            parts += [f"## {what}", _picture(name, what)]
        if name == "front" and (front := front_of(groups)):
            parts += [front_markdown(front), for_markdown(FRONT_NOTE)]
        if name == "scaling" and (lines := lines_of(groups)):
            parts += [scaling_markdown(lines), for_markdown(SCALING_NOTE)]
    return "\n\n".join([*parts, f"Written by {markdown_code(command)}."]) + "\n"


def claims_table(findings: Sequence[Finding]) -> str:
    """A Markdown table: each claim, and a line for each of its parts."""
    lines = ["| claim | | figures |", "|---|---|---|"]
    for number, finding in enumerate(findings, start=1):
        claim = f"**{number}. {for_markdown(finding.claim)}** ({finding.paper})"
        lines.append(f"| {claim} | **{finding.verdict.value}** | |")
        lines += [
            f"| {for_markdown(part.statement)} | {part.verdict.value} | {for_markdown(part.figures)} |"
            for part in finding.parts
        ]
    return "\n".join(lines)


def _picture(name: str, what: str) -> str:
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{dark(name)}.png">\n'
        f'  <img alt="{what}" src="{name}.png">\n</picture>'
    )


def dark(name: str) -> str:
    """The file name of a picture's dark one."""
    return f"{name}_dark"
