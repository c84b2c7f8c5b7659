"""``rsotrain-report``: what it reads, draws and writes."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rsotrain.errors import UserError
from rsotrain.report.claims import METHODS, Finding, examine
from rsotrain.report.comparison import comparable
from rsotrain.report.runs import Run, read_runs
from rsotrain.report.watching import Told, looks
from rsotrain.report.writing import report_on
from rsotrain.tracking.escaping import one_line, print_line
from rsotrain.tracking.screen import survive_its_loss

USER_ERROR_STATUS = 2
LONGEST_SECONDS = 86_400  # between two looks
NO_CLAIMS = f"--claims are about {', '.join(METHODS)}, each with its own sampler, and no run is of one"
DESCRIPTION = """\
Compare runs: a table on the screen, and in --out report.html (one page, readable offline), report.md,
report.csv, runs.csv with a line for each run, and each picture as PNG and SVG.

  rsotrain-report outputs                             all runs in a folder; seeds are averaged
  rsotrain-report outputs/a outputs/b --out compared
  rsotrain-report outputs --group-by optimizer        one line for each optimizer
  rsotrain-report outputs/study_full --claims         do the runs carry what the papers claim?
  rsotrain-report outputs --watch                     draw again every 30 s while runs go on
  rsotrain-report outputs --live                      a table that follows the runs, in the terminal
"""
RUN_HELP = "a run folder, a folder of them, or a W&B offline folder"
GROUP_HELP = (
    "average the runs that have the same KEY: optimizer, optimizer.rank, seq_len, … (several: with commas);"
    " default: all settings but the seed"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rsotrain-report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--group-by", action="append", default=[], metavar="KEY", help=GROUP_HELP)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--claims", action="store_true", help="hold the papers' claims against the runs")
    parser.add_argument("--mixed", action="store_true", help="compare, and mark, unlike validation data")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help="draw again while runs go on")
    mode.add_argument("--live", action="store_true", help="a table in the terminal; writes nothing")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="of --watch (30) and --live (2)")
    return parser


def main() -> None:
    """Console entry point: 0, or 2 for a user's mistake, said in one sentence."""
    survive_its_loss()
    arguments = build_parser().parse_args()
    try:
        report(arguments)
    except UserError as error:
        print_line(f"rsotrain-report: {one_line(str(error))}", sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(130)


def report(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises UserError."""
    every, keys = arguments.every, [k for given in arguments.group_by for k in given.split(",") if k]
    if every is not None and not 0 < every <= LONGEST_SECONDS:
        raise UserError(f"--every {every:g} must be positive, and no more than {LONGEST_SECONDS}")
    if every is not None and not (arguments.watch or arguments.live):
        raise UserError("--every has no effect without --watch or --live; leave it out")
    if arguments.live:
        for option in ("out", "title"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} has no effect with --live, which writes nothing; leave it out")
        if arguments.claims:
            raise UserError("--claims are for the end, and --live shows runs that go on; leave one out")
        from rsotrain.report.live import follow

        follow(arguments.runs, keys, mixed=arguments.mixed, every=every or 2.0)
        return
    told = Told()
    if arguments.watch:
        _watch(arguments, keys, every or 30.0, told)
        return
    runs = read_runs(arguments.runs, told)
    findings = examine(runs) if arguments.claims else []
    if arguments.claims and not findings:
        raise UserError(f"{NO_CLAIMS}; leave it out")
    _write(arguments, keys, runs, findings, told)


def _watch(arguments: argparse.Namespace, keys: Sequence[str], every: float, told: Told) -> None:
    """Report on each look. What is refused at the first is a mistake; later it is said, and the rest goes on.

    Raises UserError, also where the last report cannot be written.
    """
    standard: Run | None = None
    for runs, again in looks(arguments.runs, every, told):
        try:
            if standard is not None and not arguments.mixed:
                runs, unlike = comparable(runs, standard)
                for sentence in unlike:
                    told(sentence)
            findings = examine(runs) if arguments.claims else []
            if arguments.claims and not findings:
                told(NO_CLAIMS)
            _write(arguments, keys, runs, findings, told, refresh_seconds=every if again else None)
        except UserError as error:
            if standard is None or not again:
                raise
            told(str(error))
            told.take()  # of the next report it is not true any more
        standard = standard or runs[0]


def _write(
    arguments: argparse.Namespace,
    keys: Sequence[str],
    runs: Sequence[Run],
    findings: Sequence[Finding],
    told: Told,
    refresh_seconds: float | None = None,
) -> None:
    names = ", ".join(path.resolve().name for path in arguments.runs[:3])
    report_on(
        runs,
        arguments.out or Path("report"),
        arguments.title or f"Comparison: {names}{', …' if len(arguments.runs) > 3 else ''}",
        findings,
        command=shlex.join(["rsotrain-report", *sys.argv[1:]]),
        group_by=keys,
        mixed=arguments.mixed,
        refresh_seconds=refresh_seconds,
        left_out=told.take(),
    )
