"""What a multirun knows of its members, and the tables and pictures that it ends with."""

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from rsotrain.cli.mistakes import say
from rsotrain.cli.tune import tune
from rsotrain.config.schema import Mode, ReportConfig
from rsotrain.errors import UserError
from rsotrain.tracking.escaping import print_line

_members: list[list[str]] = []  # of the multirun in this process: the overrides in which each differs


def keep_outcomes() -> list[dict[str, Any]]:
    """A list that receives what ``run`` returns for each member of a multirun, wherever it ran.

    A multirun that is to end in pictures is refused where these cannot be drawn.
    """
    from hydra._internal.hydra import Hydra
    from hydra.types import RunMode

    _members.clear()
    outcomes: list[dict[str, Any]] = []
    multirun = inspect.unwrap(Hydra.multirun)  # of an earlier command in this process

    @functools.wraps(multirun)
    def kept(self: Hydra, **call: Any) -> Any:
        shared = self.compose_config(call["config_name"], call["overrides"], RunMode.MULTIRUN)
        if shared.mode in (Mode.train, Mode.tune) and shared.report.path is not None:
            from rsotrain.tracking.drawing import import_matplotlib

            try:
                import_matplotlib()
            except UserError as error:  # now, not after the last run
                raise UserError(f"{error}, or go without: report.path=null report.claims=false") from error
        if shared.mode is Mode.tune:
            outcomes.extend(tune(self.config_loader, shared, call["task_function"], call["config_name"]))
            return None
        _members[:] = _members_of(shared, call["overrides"])
        returned = multirun(self, **call)
        outcomes.extend(job.return_value for batch in returned for job in batch)
        return returned

    Hydra.multirun = kept  # type: ignore[method-assign, assignment]
    return outcomes


def _members_of(shared: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """Of each member of a multirun the overrides in which it differs; empty where Hydra refuses them."""
    params = shared.hydra.sweeper.get("params") or {}
    given = [f"{key}={value}" for key, value in params.items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*given, *overrides])
        (runs,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException:  # the sweeper says so
        return []
    return [[word for i, word in enumerate(run) if len({r[i] for r in runs}) > 1] for run in runs]


def announce(number: int) -> None:
    """Say which member of a multirun begins, counted from 0; nothing where there is one run alone."""
    if len(_members) > 1 and os.environ.get("RANK", "0") == "0":
        own = " ".join(_members[number]) if number < len(_members) else ""
        print_line(f"run {number + 1} of {len(_members)}: {own}".rstrip(": "))


def print_comparison(outcomes: Sequence[dict[str, Any]]) -> None:
    """The closing table of a multirun: its members side by side, those that have metrics; their report."""
    if os.environ.get("RANK", "0") != "0":
        return
    benchmarks = [outcome["benchmark"] for outcome in outcomes if "benchmark" in outcome]
    if len(benchmarks) > 1:
        from rsotrain.benchmark.tables import print_benchmarks

        print_benchmarks(benchmarks)
    trained = [outcome for outcome in outcomes if "folder" in outcome]
    if trained:
        try:
            compare_members(list(dict.fromkeys(t["folder"] for t in trained)), trained[0]["report"])
        except UserError as error:  # somebody has touched a folder; the runs themselves have ended well
            say(error)
            return
    planned = [outcome for outcome in outcomes if "plan" in outcome]
    if len(planned) > 1:
        from rsotrain.planner.show import print_plans

        print_plans([outcome["plan"] for outcome in planned], planned[0]["output_dir"])


def compare_members(folders: Sequence[Path], wanted: ReportConfig) -> None:
    """Table of the runs in ``folders``; with the report that is ``wanted``, both of those beside them, too.

    A part of a study that is run again is so reported on with the rest. Beside them are runs in the same
    folder that differ in method and seed alone. Raises UserError.
    """
    from rsotrain.report.claims import examine
    from rsotrain.report.evidence import of_their_job
    from rsotrain.report.runs import has_metrics, read_neighbours, read_runs
    from rsotrain.report.watching import Told
    from rsotrain.report.writing import report_on

    folders = [folder for folder in folders if has_metrics(folder)]
    if not folders or (wanted.path is None and len(folders) < 2):
        return
    out = None if wanted.path is None else Path(wanted.path).expanduser()
    runs, told = read_runs(folders), Told("rsotrain")
    if out is not None:
        runs += of_their_job(runs, read_neighbours(folders, told))
    title, command = f"Comparison: {folders[0].parent.name}", shlex.join(["rsotrain", *sys.argv[1:]])
    report_on(
        runs, out, title, examine(runs) if wanted.claims else (), command=command, mixed=True,
        left_out=told.take(),
    )  # fmt: skip
