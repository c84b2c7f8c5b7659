"""A report's files, and what of it is for the screen."""

import time
from collections.abc import Sequence
from pathlib import Path

from rsotrain.errors import UserError
from rsotrain.files import write_atomic
from rsotrain.report.claims import Finding
from rsotrain.report.comparison import Group, compare
from rsotrain.report.document import dark, document
from rsotrain.report.fairness import doubts
from rsotrain.report.runs import Run
from rsotrain.report.tables import claims_screen, comma_separated, run_list, screen
from rsotrain.tracking.escaping import for_terminal, print_line
from rsotrain.tracking.theme import DARK, LIGHT

PAGE = "report.html"


def report_on(
    runs: Sequence[Run],
    out: Path | None,
    title: str,
    findings: Sequence[Finding] = (),
    *,
    command: str,
    group_by: Sequence[str] = (),
    mixed: bool = False,
    refresh_seconds: float | None = None,
    left_out: Sequence[str] = (),
) -> None:
    """Compare ``runs``, write the report to ``out`` where that is given, and print the tables.

    ``findings``: of the papers' claims. ``refresh_seconds``: it is written again after so long, and a line
    printed in place of the tables. ``group_by``, ``mixed``: as in ``compare``. ``left_out``: sentences about
    runs that were found and are not among ``runs``. Raises UserError.
    """
    groups = compare(runs, group_by, mixed=mixed)
    paths = []
    if out is not None:
        paths = write_report(
            groups, out, title, findings, command=command, refresh_seconds=refresh_seconds, left_out=left_out
        )
    if refresh_seconds is None:
        print_comparison(groups, findings)
        if paths:
            print_line(f"{paths[0]} and {len(paths) - 1} more files")
        return
    finished = sum(run.finished for run in runs)
    print_line(f"{time.strftime('%H:%M:%S')}  {len(runs)} runs, {finished} finished: {paths[0]}")


def print_comparison(groups: Sequence[Group], findings: Sequence[Finding] = ()) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(screen(groups, console.width), highlight=False)
    for sentence in doubts(groups):
        console.print(Text(for_terminal(sentence), style="dim"))
    if findings:
        console.print(claims_screen(findings), highlight=False)


def write_report(
    groups: Sequence[Group],
    out: Path,
    title: str,
    findings: Sequence[Finding] = (),
    *,
    command: str,
    refresh_seconds: float | None = None,
    left_out: Sequence[str] = (),
) -> list[Path]:
    """Pages, tables and pictures in ``out``; the HTML page first. ``command``: what wrote it, for the reader.

    Raises UserError where it cannot be written, or matplotlib is missing.
    """
    from rsotrain.report.front import front_csv, front_latex, front_of
    from rsotrain.report.page import page
    from rsotrain.report.plots import draw, svg_text
    from rsotrain.report.scaling import lines_of, scaling_csv
    from rsotrain.tracking.drawing import write_png

    figures = draw(groups, LIGHT)
    front, lines = front_of(groups), lines_of(groups)
    svgs = {name: svg_text(name, figure) for name, figure in figures.items()}
    texts = {
        PAGE: page(groups, svgs, title, findings, refresh_seconds, left_out),
        "report.md": document(groups, findings, figures, title, command, left_out),
        "runs.csv": run_list(groups),
        "report.csv": comma_separated(groups),
        **({"front.csv": front_csv(front), "front.tex": front_latex(front)} if front else {}),
        **({"scaling.csv": scaling_csv(lines)} if lines else {}),
        **{f"{name}.svg": svg for name, svg in svgs.items()},
    }
    pictures = [(name, figure, LIGHT) for name, figure in figures.items()]
    pictures += [(dark(name), figure, DARK) for name, figure in draw(groups, DARK).items()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
        for name, figure, palette in pictures:
            write_png(figure, out / f"{name}.png", palette)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    return [out / name for name in [*texts, *(f"{name}.png" for name, _, _ in pictures)]]
