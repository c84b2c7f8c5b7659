"""``mode=tune``: ordinary runs with several values of one number, until the best has worse ones beside it.

``search.py`` says which values; this file starts them through Hydra's launcher, all that are due at once, and
writes the best to a file that ``tuned=`` takes. What an earlier start has trained is read from its folder.
"""

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rsotrain.cli.overrides import key_of
from rsotrain.cli.search import Best, best_of
from rsotrain.cli.searches import SEED, Search, config_of, searches_of, tune_settings
from rsotrain.cli.tuned_file import write_tuned
from rsotrain.config.data import TuneConfig
from rsotrain.config.identity import run_folder_path
from rsotrain.config.schema import Config
from rsotrain.errors import INTERRUPTED_STATUS, UserError
from rsotrain.files import read_json
from rsotrain.tracking.escaping import print_line
from rsotrain.tracking.run_files import DIVERGED, RUN_RECORD, SUMMARY

LOSS = "val/loss"


class Trial(NamedTuple):
    search: Search
    rung: int
    number: int
    overrides: list[str]


def tune(
    loader: ConfigLoader, shared: DictConfig, task_function: TaskFunction, config_name: str | None
) -> list[dict[str, Any]]:
    """What ``run`` returned for each trial, or would have: those of earlier starts are among them.

    ``shared``: the composed configuration of the multirun. Raises UserError.
    """
    settings = tune_settings(shared)
    callbacks = Callbacks(shared)
    callbacks.on_multirun_start(config=shared, config_name=config_name)
    launcher = Plugins.instance().instantiate_launcher(
        HydraContext(config_loader=loader, callbacks=callbacks), task_function, shared
    )
    searches = searches_of(loader, shared, settings)
    outcomes = _trials(loader, shared, launcher, searches, settings)
    if all(outcome["status"] == 0 for outcome in outcomes):
        for search in searches:
            _conclude(loader, search, settings)
        if len(searches) > 1:
            names = ",".join(search.name for search in searches)
            folder = shlex.quote(str(_folder(searches[0], settings)))
            _say(f"all of them: rsotrain --config-dir {folder} -m tuned={names}")
    callbacks.on_multirun_end(config=shared, config_name=config_name)
    return outcomes


# --- the trials --------------------------------------------------------------------------------------


def _trials(
    loader: ConfigLoader,
    shared: DictConfig,
    launcher: Launcher,
    searches: Sequence[Search],
    settings: TuneConfig,
) -> list[dict[str, Any]]:
    """Start what is due until nothing is, or until a run has ended for another reason than its value."""
    # a launcher that runs one after the other decides anew after each
    alone = shared.hydra.launcher._target_.endswith(".BasicLauncher")
    at_once = 1 if alone else shared.hydra.sweeper.max_batch_size
    outcomes: list[dict[str, Any]] = []
    started, unknown = 0, set[tuple[str, ...]]()
    while due := [
        Trial(search, rung, number, _overrides(search, rung, number, settings.key))
        for search in searches
        for rung, number in search.wanted(settings.max_values)
    ]:
        for trial in due:
            if tuple(trial.overrides) in unknown:
                continue
            if (outcome := _known(loader, shared, trial)) is not None:
                outcomes.append(_taken(trial, outcome))
        fresh = [trial for trial in due if trial.number not in trial.search.losses.get(trial.rung, {})]
        unknown |= {tuple(trial.overrides) for trial in fresh}
        if len(fresh) < len(due):  # what is due may be something else now
            continue
        batch = due[:at_once]
        for trial in batch:
            value = trial.search.ladder.value(trial.rung)
            _say(f"{trial.search.name}: {settings.key}={value:g}{_seed(trial)}")
        returned = launcher.launch([trial.overrides for trial in batch], initial_job_idx=started)
        started += len(batch)
        for trial, job in zip(batch, returned, strict=True):
            outcomes.append(_taken(trial, job.return_value))
        if any(outcome["status"] for outcome in outcomes):
            if max(outcome["status"] for outcome in outcomes) != INTERRUPTED_STATUS:
                _say("the search ends with this run; once that is mended, the same command goes on")
            break
    return outcomes


def _overrides(search: Search, rung: int, number: int, key: str) -> list[str]:
    return [*search.members[number], f"{key}={search.ladder.value(rung):.12g}"]


def _known(loader: ConfigLoader, shared: DictConfig, trial: Trial) -> dict[str, Any] | None:
    """The outcome of a trial that an earlier start has trained to its end, or to where it diverged."""
    config = config_of(loader.load_sweep_config(shared, trial.overrides), trial.overrides)
    if config.overwrite or config.epochs is not None:  # of these the data say how many steps they are
        return None
    from rsotrain.running.settled import settle_precision  # which imports torch

    folder = run_folder_path(settle_precision(config)).resolve()
    outcome = {"status": 0, "folder": folder, "report": config.report}
    try:
        if (folder / SUMMARY).is_file():
            summary = read_json(folder / SUMMARY)
            if summary.get("finished") and isinstance(summary.get(LOSS), float):
                return outcome | {"loss": summary[LOSS]}
        if (folder / RUN_RECORD).is_file() and read_json(folder / RUN_RECORD).get(DIVERGED):
            return outcome | {DIVERGED: True}
    except (UserError, AttributeError):  # damaged: the run itself says so, or mends it
        return None
    return None


def _taken(trial: Trial, outcome: dict[str, Any]) -> dict[str, Any]:
    """Enter the outcome into the trial's search; that a value diverges is an answer, no failure."""
    if outcome.get(DIVERGED):
        outcome = outcome | {"status": 0}
    if outcome["status"] == 0:
        loss = outcome.get("loss")
        loss = math.inf if loss is None or not math.isfinite(loss) else loss
        trial.search.losses.setdefault(trial.rung, {})[trial.number] = loss
    return outcome


def _seed(trial: Trial) -> str:
    words = [word for word in trial.overrides if key_of(word) == SEED]
    return f" {words[-1]}" if words and len(trial.search.members) > 1 else ""


# --- the end -----------------------------------------------------------------------------------------


def _conclude(loader: ConfigLoader, search: Search, settings: TuneConfig) -> None:
    """Say what was best and write it down. Raises UserError where all have diverged."""
    means = search.means()
    best = best_of(means)
    tried = "; ".join(
        f"{search.ladder.value(rung):g}: {f'{loss:.4f}' if math.isfinite(loss) else 'diverged'}"
        for rung, loss in sorted(means.items())
    )
    if best is None:
        raise UserError(
            f"{search.name}: every {settings.key} that was tried diverged ({tried}); begin lower with"
            f" {settings.key}=…"
        )
    value = search.ladder.value(best.rung)
    assert value is not None
    doubt = _doubt(search, best, settings)
    end = f", but not tuned: {doubt}" if doubt else ""
    _say(f"{search.name}: {settings.key} {tried}; best at {value:g}{end}")
    if os.environ.get("RANK", "0") != "0":
        return
    folder = _folder(search, settings)
    choices = search.composed.hydra.runtime.choices
    options = {group: choices[group] for group in ("optimizer", "sampler")}
    plain_options = [f"{group}={name}" for group, name in options.items()]
    plain_options.append(f"precision={search.config.precision.name}")
    without = loader.load_configuration("config", plain_options, RunMode.RUN)
    file = write_tuned(
        folder / "tuned" / f"{search.name}.yaml",
        options,
        {group: _raw(search.composed, group) for group in options},
        {group: _raw(without, group) for group in options},
        {settings.key: value},
        comment=[
            f"Found for {search.config.model.name} by {_command()}",
            f"Validation loss after {_length(search.config)} for several values of {settings.key},"
            + (f" but not tuned: {doubt}" if doubt else " of which this file has the best:"),
            tried,
        ],
    )
    _say(f"{file}: use it with rsotrain --config-dir {shlex.quote(str(folder))} tuned={search.name}")


def _folder(search: Search, settings: TuneConfig) -> Path:
    """The one that ``--config-dir`` takes."""
    if settings.path is not None:
        return Path(settings.path).expanduser()
    return Path(search.config.output_dir).expanduser() / "conf"


def _doubt(search: Search, best: Best, settings: TuneConfig) -> str:
    """Why the best is not known to be one; empty where it lies inside."""
    if best.inside:
        return ""
    beyond = [rung for rung in (best.rung - 1, best.rung + 1) if rung not in search.means()]
    if all(search.ladder.value(rung) is None for rung in beyond):
        end = "smallest" if beyond[0] < best.rung else "largest"
        return f"it is the {end} that may be tried"
    return f"tune.max_values={settings.max_values} were tried, and none has worse ones on both sides"


def _length(config: Config) -> str:
    return f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"


def _raw(composed: DictConfig, group: str) -> dict[str, Any]:
    found = OmegaConf.to_container(composed[group], resolve=False, enum_to_str=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _command() -> str:
    return shlex.join(["rsotrain", *(word for word in sys.argv[1:] if word not in ("-m", "--multirun"))])


def _say(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print_line(sentence)
