"""The console command: compose, convert, check, run, and say what went wrong."""

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rsotrain.cli.compose import checked_config, register_schemas
from rsotrain.cli.flags import as_multirun, config_dir, split_flags
from rsotrain.cli.help import list_groups, list_keys, skip_hydras_list_of_groups
from rsotrain.cli.mistakes import FULL_ERROR, is_hydras, say, say_interrupted
from rsotrain.cli.multirun import announce, keep_outcomes, print_comparison
from rsotrain.cli.overrides import check_length, check_overrides, normalise
from rsotrain.cli.plugins import load_plugins
from rsotrain.config.defaults import conf_dir
from rsotrain.config.identity import run_folder_path
from rsotrain.config.schema import Mode
from rsotrain.data.validation import check_files
from rsotrain.errors import (
    INTERRUPTED_STATUS,
    Interrupted,
    NonFiniteError,
    StoppedEarly,
    TrainingError,
    UserError,
)
from rsotrain.parallel.slurm import adopt_slurm_step
from rsotrain.running.allocator import keep_freed_memory
from rsotrain.running.interrupt import leaving_at_once
from rsotrain.tracking.run_files import DIVERGED
from rsotrain.tracking.screen import silence

OWN_FULL_ERROR = "RSOTRAIN_FULL_ERROR"  # FULL_ERROR is set, but not by the user
USER_ERROR_STATUS = 2
FAILED_STATUS = 1
KEYBOARD_STATUS = 130  # as a shell reports SIGINT

_wants_traceback = os.environ.get(FULL_ERROR) == "1" and OWN_FULL_ERROR not in os.environ
# Worst exit status of the runs of one command; a refused member does not end a multirun.
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
        adopt_slurm_step()
        hydras = HydraConfig.get()
        if hydras.mode is RunMode.MULTIRUN:
            announce(hydras.job.num)
        config = checked_config(composed, hydras.runtime.choices.get("tuned"), hydras.overrides.task)
        check_files(config.data)
        check_length(config.epochs, hydras.overrides.task)
        keep_freed_memory()
        with leaving_at_once():
            # torch is imported from here on
            from rsotrain.cli.dispatch import run_mode, settle

            config = settle(config)
            if config.mode is Mode.train:
                outcome |= {"folder": run_folder_path(config).resolve(), "report": config.report}
            result = run_mode(config)
        if config.mode is Mode.train:
            outcome["loss"] = result.get("val/loss")
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
        if isinstance(error, NonFiniteError):
            outcome[DIVERGED] = True
    _status = max(_status, outcome["status"])
    return outcome


def main() -> None:
    """Console entry point: 0, or 2 for a user's mistake, 1 for a failed training; see errors.py."""
    global _status
    _status = 0
    OmegaConf.register_new_resolver("rsotrain.groups", list_groups, replace=True)
    OmegaConf.register_new_resolver("rsotrain.keys", list_keys, replace=True)
    if not {"--help", "-h"}.isdisjoint(sys.argv):
        skip_hydras_list_of_groups()
    if not _wants_traceback:
        os.environ[FULL_ERROR] = os.environ[OWN_FULL_ERROR] = "1"  # else Hydra prints and exits by itself
    outcomes = keep_outcomes()
    application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(run)
    try:
        if "--version" in sys.argv[1:]:
            print(f"rsotrain {version('rsotrain')}")
            sys.exit(0)
        flags, given = split_flags(sys.argv[1:])
        load_plugins(config_dir(flags))
        register_schemas()
        overrides = normalise(given)
        check_overrides(overrides)
        if "mode=tune" in overrides:
            flags = as_multirun(flags)
        sys.argv[1:] = flags + overrides
        application()
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(KEYBOARD_STATUS)
    except BrokenPipeError:  # `rsotrain --help | head`
        silence(sys.stdout)
        sys.exit(0)
    except Exception as error:
        expected = isinstance(error, HydraException | OmegaConfBaseException | yaml.YAMLError | UserError)
        if _wants_traceback or not (expected or is_hydras(error)):
            raise
        say(error)
        sys.exit(USER_ERROR_STATUS)
    finally:
        if not _wants_traceback:
            del os.environ[FULL_ERROR], os.environ[OWN_FULL_ERROR]
    print_comparison(outcomes)
    # a multirun's outcomes say it all: of its members one in this process may have diverged in a search
    sys.exit(max([outcome["status"] for outcome in outcomes], default=_status))
