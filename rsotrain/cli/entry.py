"""The command line: the only file that knows Hydra. Compose, convert, check, run."""

import itertools
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rsotrain.cli.overrides import (
    check_choices,
    check_tuned,
    did_you_mean,
    explain_misfit,
    flatten,
    known_keys,
    normalise,
)
from rsotrain.config.schema import SCHEMAS, Config, Mode, ReportConfig
from rsotrain.errors import (
    INTERRUPTED_STATUS,
    Interrupted,
    LostRankError,
    StoppedEarly,
    TrainingError,
    UserError,
)
from rsotrain.parallel.slurm import adopt_slurm_step
from rsotrain.running.allocator import keep_freed_memory
from rsotrain.running.folder import plain, run_folder_path
from rsotrain.running.interrupt import leaving_on_warning

FULL_ERROR = "HYDRA_FULL_ERROR"
OWN_FULL_ERROR = "RSOTRAIN_FULL_ERROR"  # FULL_ERROR is set, but not by the user
USER_ERROR_STATUS = 2
FAILED_STATUS = 1
_PATIENCE_SECONDS = 5.0
HELP_WIDTH = 100
_MISFIT = re.compile(
    r"In '((?:experiment|tuned)/.+)': (\w+) raised while composing config:\n(.+)\n"
    r"\s+full_key: (\S+)\n(?:\s+reference_type=.+\n)?\s+object_type=(\w+)"
)


def conf_dir() -> Path:
    """The folder of YAML groups: inside the installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/config.yaml beside {package}: the installation is incomplete")


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, under ``schema/`` so that they are no user's option."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    OmegaConf.register_new_resolver("rsotrain.pretrained", pretrained_value, replace=True)


def pretrained_value(folder: str | None, name: str) -> Any:
    """One field of the model in a Hugging Face folder, for conf/model/pretrained.yaml."""
    from rsotrain.models.huggingface_config import read_config

    if folder is None:
        raise UserError("model.init_from has no value; give a Hugging Face folder with model.init_from=…")
    return getattr(read_config(Path(folder).expanduser()), name)


def to_config(composed: DictConfig) -> Config:
    """The composed YAML as typed dataclasses; ``DictConfig`` stops here.

    Raises UserError for a value that is missing or a key that ``+key=`` smuggled past the schema.
    """
    known = set(known_keys())
    for key, _ in flatten(OmegaConf.to_container(composed)):  # type: ignore[arg-type]
        if key not in known:
            raise UserError(f"unknown key {key}{did_you_mean(key, sorted(known))}")
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{missing[0]} has no value; give it with {missing[0]}=…")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    for key, value in flatten(plain(config)):  # ~key deletes a key, and the dataclass has nothing for it
        if value == MISSING:
            raise UserError(f"{key} has no value; give it with {key}=…")
    return config


def list_groups() -> str:
    """The groups and their options for ``--help``: a group a paragraph, models and recipes by size."""
    folders = [conf_dir()]
    arguments = [part for a in sys.argv for part in (a.split("=", 1) if a.startswith("--") else [a])]
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value))
    options: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    return "\n".join(
        textwrap.fill(
            f"{group}: {', '.join(sorted(names, key=_by_size))}",
            width=HELP_WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for group, names in sorted(options.items())
    )


def _by_size(name: str) -> tuple[str, int]:
    """A key that puts llama_60m before llama_130m, and that before llama_1b."""
    sized = re.fullmatch(r"(.+_)(\d+)([mb])", name)
    return (sized[1], int(sized[2]) * (1000 if sized[3] == "b" else 1)) if sized else (name, 0)


def skip_hydras_list_of_groups() -> None:
    """Hydra lists all groups for every ``--help``, which takes a second; ours shows ``list_groups``."""
    from hydra._internal.hydra import Hydra

    Hydra.format_config_groups = lambda *_, **__: ""  # type: ignore[method-assign]


_wants_traceback = os.environ.get(FULL_ERROR) == "1" and OWN_FULL_ERROR not in os.environ
# Worst exit status of the runs of this process; a refused member does not end a multirun.
_status = 0


def run(composed: DictConfig) -> dict[str, Any]:
    """One run, as Hydra calls it, possibly in a process of submitit's.

    A mistake or a failed training prints its sentence. Returns the exit status and, of a training, the
    run's folder, or the plan or the benchmark: what the process that started a multirun needs to know of its
    members.
    """
    global _status
    outcome: dict[str, Any] = {"status": 0}
    try:
        from rsotrain.config.validation import validate

        adopt_slurm_step()
        config = to_config(composed)
        hydras = HydraConfig.get()
        tuned = hydras.runtime.choices.get("tuned")
        if tuned and (conf_dir() / f"tuned/{tuned}.yaml").is_file():  # ours bear their optimizer's name
            check_tuned(tuned, config.optimizer.name, hydras.overrides.task)
        validate(config)
        if config.mode is Mode.train:
            outcome |= {"folder": run_folder_path(config).resolve(), "report": config.report}
        keep_freed_memory()
        with leaving_on_warning():
            from rsotrain.running.run import run_mode  # torch is imported from here on

            result = run_mode(config)
        if config.mode is Mode.plan:
            outcome |= {"plan": result, "output_dir": Path(config.output_dir).expanduser()}
        if config.mode is Mode.benchmark:
            outcome["benchmark"] = result
    except StoppedEarly:  # has said so; the other runs of a multirun go on
        outcome["status"] = INTERRUPTED_STATUS
    except Interrupted as end:
        if "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        # What submitit does on its signal, now that all is saved: it submits the run again and exits.
        if end.signal_number is not None and callable(signal.getsignal(end.signal_number)):
            signal.raise_signal(end.signal_number)
        outcome["status"] = INTERRUPTED_STATUS
    except (UserError, TrainingError, OmegaConfBaseException) as error:
        if _wants_traceback:
            raise
        say(error)
        outcome["status"] = FAILED_STATUS if isinstance(error, TrainingError) else USER_ERROR_STATUS
    _status = max(_status, outcome["status"])
    return outcome


def keep_outcomes() -> list[dict[str, Any]]:
    """A list that receives what ``run`` returns for each member of a multirun, wherever it ran.

    A multirun that is to end in pictures is refused where these cannot be drawn.
    """
    from hydra._internal.hydra import Hydra
    from hydra.types import RunMode

    outcomes: list[dict[str, Any]] = []
    multirun = Hydra.multirun

    def kept(self: Hydra, **call: Any) -> Any:
        shared = self.compose_config(call["config_name"], call["overrides"], RunMode.MULTIRUN)
        if shared.mode is Mode.train and shared.report.path is not None:
            from rsotrain.tracking.drawing import import_matplotlib

            try:
                import_matplotlib()
            except UserError as error:  # now, not after the last run
                raise UserError(f"{error}, or go without: report.path=null report.claims=false") from error
        returned = multirun(self, **call)
        outcomes.extend(job.return_value for batch in returned for job in batch)
        return returned

    Hydra.multirun = kept  # type: ignore[method-assign, assignment]
    return outcomes


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
    from rsotrain.report.writing import report_on

    folders = [folder for folder in folders if has_metrics(folder)]
    if not folders or (wanted.path is None and len(folders) < 2):
        return
    out = None if wanted.path is None else Path(wanted.path).expanduser()
    runs = read_runs(folders)
    if out is not None:
        runs += of_their_job(runs, read_neighbours(folders))
    title, command = f"Comparison: {folders[0].parent.name}", shlex.join(["rsotrain", *sys.argv[1:]])
    report_on(runs, out, title, examine(runs) if wanted.claims else (), command=command, mixed=True)


def say(error: Exception) -> None:
    """Print the sentence. Of several processes on a node the first does so at once.

    The others wait a little: if it has failed, too, torchrun has ended them by then.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and not isinstance(error, LostRankError):
        time.sleep(_PATIENCE_SECONDS)
    print(f"rsotrain: {explain(error)}", file=sys.stderr)


def explain(error: Exception) -> str:
    """One sentence for a mistake in the command line or in a YAML file."""
    if isinstance(error, UserError | TrainingError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        if error.options is None:
            return " ".join(str(error).split("\n\n")[0].split())
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [o for o in error.options if not o.startswith("schema")]
        near = did_you_mean(option, options)
        return f"{group}={option} does not exist{near} (there are: {', '.join(options)})"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} is not of the form key=value"
            " (quote values that contain spaces, commas, brackets or '=' as key=\"'…'\")"
        )
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
        return f"{where}not valid YAML ({getattr(error, 'problem', error)})"
    if isinstance(error.__cause__, UserError):  # raised by a resolver
        return str(error.__cause__)
    if misfit := _MISFIT.match(str(error)):
        source, kind, text, key, schema = misfit.groups()
        experiments = [path.stem for path in (conf_dir() / "experiment").glob("*.yaml")]
        reason = "" if kind == "ConfigKeyError" else text
        return explain_misfit(source, key, reason, schema, sys.argv[1:], experiments)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = str(cause).split("\n")
    text = " ".join(lines[:2] if lines[0].endswith("composing config:") else lines[:1])
    key = getattr(cause, "full_key", None)
    if unknown := re.match(r"(?:Key '(.+?)' (?:is )?not in|Could not override '(.+?)')", text):
        key = key or unknown[1] or unknown[2]
        return f"unknown key {key}{did_you_mean(key, known_keys())}"
    return f"{key}: {text}" if key else " ".join(text.split())


def main() -> None:
    """Console entry point: 0, or 2 for a user's mistake, 1 for a failed training; see errors.py."""
    register_schemas()
    OmegaConf.register_new_resolver("rsotrain.groups", list_groups, replace=True)
    # argparse wants what begins with a dash in front: mode=plan -m optimizer=adam,rso should do, too
    sys.argv[1:] = sorted(normalise(sys.argv[1:]), key=lambda given: given not in ("-m", "--multirun"))
    if not {"--help", "-h"}.isdisjoint(sys.argv):
        skip_hydras_list_of_groups()
    if not _wants_traceback:
        os.environ[FULL_ERROR] = os.environ[OWN_FULL_ERROR] = "1"  # else Hydra prints and exits by itself
    outcomes = keep_outcomes()
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run)
    try:
        check_choices(sys.argv[1:])
        application()
    except KeyboardInterrupt:
        sys.exit(130)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UserError) as error:
        if _wants_traceback:
            raise
        say(error)
        sys.exit(USER_ERROR_STATUS)
    finally:
        if not _wants_traceback:
            del os.environ[FULL_ERROR], os.environ[OWN_FULL_ERROR]
    print_comparison(outcomes)
    sys.exit(max([_status, *(outcome["status"] for outcome in outcomes)]))
