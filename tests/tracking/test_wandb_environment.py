"""The configuration wins over W&B's variables, and these over our defaults."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Cli
from helpers.fake_wandb_server import FakeWandbServer
from helpers.wandb_harness import Wandb, records

from rsotrain.config.schema import LoggerConfig, WandbMode
from rsotrain.errors import UserError
from rsotrain.tracking.loggers import build_loggers
from rsotrain.tracking.wandb_environment import (
    init_timeout_seconds,
    own_arguments,
    own_settings,
    resolve_mode,
)


def config(**options: Any) -> LoggerConfig:
    return LoggerConfig(name="test", wandb=True, **options)


@pytest.mark.parametrize(
    ("environment", "configured", "mode"),
    [
        ({}, None, WandbMode.auto),
        ({"WANDB_MODE": ""}, None, WandbMode.auto),
        ({"WANDB_MODE": "offline"}, None, WandbMode.offline),
        ({"WANDB_MODE": "dryrun"}, None, WandbMode.offline),
        ({"WANDB_MODE": "online"}, None, WandbMode.online),
        ({"WANDB_MODE": "run"}, None, WandbMode.online),
        ({"WANDB_MODE": "shared"}, None, WandbMode.shared),
        ({"WANDB_MODE": "disabled"}, None, None),
        ({"WANDB_MODE": "online"}, WandbMode.offline, WandbMode.offline),
        ({"WANDB_MODE": "offline"}, WandbMode.auto, WandbMode.auto),
        ({"WANDB_MODE": "of"}, WandbMode.offline, WandbMode.offline),
        ({"WANDB_MODE": "disabled"}, WandbMode.online, None),  # a switch for the whole program
        ({"WANDB_DISABLED": "true"}, WandbMode.online, None),
        ({"WANDB_DISABLED": "false"}, None, WandbMode.auto),
        ({}, WandbMode.disabled, None),
    ],
)
def test_mode(environment: dict[str, str], configured: WandbMode | None, mode: WandbMode | None) -> None:
    assert resolve_mode(config(wandb_mode=configured), environment) is mode


def test_a_mode_that_is_none_is_refused_where_there_is_to_be_wandb() -> None:
    with pytest.raises(UserError, match="WANDB_MODE=of is not a mode of W&B; set it to online, offline"):
        resolve_mode(config(), {"WANDB_MODE": "of"})
    assert resolve_mode(LoggerConfig(name="jsonl"), {"WANDB_MODE": "of"}) is None


def test_seconds_for_the_server() -> None:
    assert init_timeout_seconds(config(), {}) == 30
    assert init_timeout_seconds(config(), {"WANDB_INIT_TIMEOUT": "90"}) == 90
    assert init_timeout_seconds(config(wandb_init_timeout_seconds=5.0), {"WANDB_INIT_TIMEOUT": "90"}) == 5
    for text in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"WANDB_INIT_TIMEOUT={text} must be a number of seconds"):
            init_timeout_seconds(config(), {"WANDB_INIT_TIMEOUT": text})


def test_what_the_environment_decides_is_not_ours() -> None:
    assert own_settings({})["disable_git"] is True
    assert "disable_git" not in own_settings({"WANDB_DISABLE_GIT": "false"})
    assert not {"save_code", "disable_code"} & set(own_settings({"WANDB_SAVE_CODE": "true"}))
    assert own_arguments("run", "name", {}) == {"dir": "run", "name": "name", "resume": "allow"}
    everything = {"WANDB_DIR": "elsewhere", "WANDB_NAME": "other", "WANDB_RESUME": "must"}
    assert own_arguments("run", "name", everything) == {}


VARIABLES = {
    "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "them", "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "a,b",
    "WANDB_NOTES": "remember", "WANDB_NAME": "n", "WANDB_JOB_TYPE": "train",
}  # fmt: skip


@pytest.fixture
def offline_run(wandb_runs: Wandb, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What W&B records of a run with a configuration and variables."""

    def record(variables: dict[str, str], is_named: bool = False, **options: Any) -> Any:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        loggers = build_loggers(
            config(**options),
            run_dir=wandb_runs.folder,
            run_id="run-1",
            run_name="a run",
            is_named=is_named,
            flat_config={},
            resume_step=None,
            warn=wandb_runs.warnings.append,
        )
        loggers.log({"train/loss": 1.0}, 1)
        loggers.close({}, 0)
        assert wandb_runs.warnings == []
        (run,) = [record.run for record in wandb_runs.offline_records() if record.HasField("run")]
        return run

    return record


@pytest.mark.slow
def test_variables_win_over_defaults(offline_run: Callable[..., Any]) -> None:
    run = offline_run(VARIABLES)
    assert (run.project, run.entity, run.run_group, run.display_name) == ("theirs", "them", "g", "n")
    assert (list(run.tags), run.notes, run.job_type) == (["a", "b"], "remember", "train")


def test_the_configuration_wins_over_variables(offline_run: Callable[..., Any]) -> None:
    run = offline_run(
        VARIABLES,
        is_named=True,
        wandb_project="rsotrain",  # said, though it is the default
        wandb_entity="me",
        wandb_group="mine",
        wandb_tags=["c"],
    )
    assert (run.project, run.entity, run.run_group, run.display_name) == ("rsotrain", "me", "mine", "a run")
    assert list(run.tags) == ["c"]
    assert (run.notes, run.job_type) == ("remember", "train")  # no key of ours


def test_defaults_without_either(offline_run: Callable[..., Any]) -> None:
    run = offline_run({})
    assert (run.project, run.entity, run.run_group, run.display_name) == ("rsotrain", "", "", "a run")
    assert list(run.tags) == []


def test_the_files_of_wandb_init_win_over_our_default(
    offline_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nproject = filed\n")
    monkeypatch.chdir(tmp_path)
    assert offline_run({}).project == "filed"


def test_the_folder_of_the_environment(
    wandb_runs: Wandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(elsewhere))
    logger = wandb_runs()
    logger.close({}, 0)
    assert isinstance(logger.place, Path)
    assert logger.place.parent == elsewhere / "wandb"
    assert not (wandb_runs.folder / "wandb").exists()


def test_resume_of_the_environment(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    monkeypatch.setenv("WANDB_RESUME", "must")  # there is no such run yet
    logger = wandb_runs()
    logger.close({}, 0)
    (warning,) = wandb_runs.warnings
    assert "not reachable" in warning
    assert "does not exist" in warning


def test_a_shared_run_arrives_without_steps_of_wandbs(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    server = connect()
    logger = wandb_runs(WandbMode.shared)
    for step in (1, 2, 3):
        logger.log({"train/loss": 1 / step}, step)
    logger.close({"val/loss": 2.5}, 0)
    assert wandb_runs.warnings == []
    run = server.runs["run-1"]
    assert [(row["step"], row["train/loss"]) for row in run["history"]] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_disabled_means_no_wandb_at_all(
    variables: dict[str, str], cli: Cli, tiny: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'wandb': raise SystemExit('wandb is imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    overrides = [o for o in tiny if not o.startswith(("logger=", "evaluation.samples="))]
    environment = {"WANDB_MODE": ""} | variables
    done = cli(*overrides, "logger=wandb", "run_name=r", PYTHONPATH=path, **environment)
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout + done.stderr
    assert not (tmp_path / "outputs/r/wandb").exists()
    assert len(records(tmp_path / "outputs/r/metrics.jsonl")) > 1
