"""W&B in good and bad health: records arrive, or one warning does, and training never waits.

Every wait is bounded: by the timeouts handed to the logger, and by ``until``.
"""

import atexit
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import ROOT
from helpers.fake_wandb_server import FakeWandbServer
from helpers.wandb_harness import API_KEY, Wandb, log_unhindered, records, until

from rsotrain.config.schema import LoggerConfig, WandbMode
from rsotrain.tracking.loggers import Loggers, build_loggers
from rsotrain.tracking.wandb_logger import WandbLogger


def test_wandb_offline_without_a_key_records_everything(wandb_runs: Wandb) -> None:
    logger = wandb_runs()
    log_unhindered(logger)
    logger.log({"train/loss": math.nan, "val/loss": 2.5}, 201)
    logger.close({"val/loss": 2.5, "run": "x", "nothing": None, "path": wandb_runs.folder}, exit_code=3)
    assert wandb_runs.warnings == []
    assert logger.place is not None
    assert Path(logger.place).parent == wandb_runs.folder / "wandb"

    history = wandb_runs.offline_history()
    assert [row["step"] for row in history] == [row["_step"] for row in history] == list(range(1, 202))
    assert [row["train/loss"] for row in history[:200]] == [1 / step for step in range(1, 201)]
    assert math.isnan(float(history[200]["train/loss"]))
    found = wandb_runs.offline_records()
    (run,) = [record.run for record in found if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_id, run.display_name, run.project) == ("run-1", "a run", "rsotrain")
    assert config["optimizer.lr"] == 0.01
    assert config["optimizer.betas"] == [0.9, 0.99]
    assert {record.exit.exit_code for record in found if record.HasField("exit")} == {3}
    updates = [item for record in found if record.HasField("summary") for item in record.summary.update]
    summary = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    assert (summary["val/loss"], summary["run"]) == (2.5, "x")
    assert any(record.metric.step_metric == "step" for record in found if record.HasField("metric"))


def test_wandb_online_history_config_summary_and_exit_code_arrive(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    server = connect()
    logger = wandb_runs(group="sizes", tags=["a"])
    log_unhindered(logger)
    logger.close({"val/loss": 2.5}, exit_code=7)
    assert wandb_runs.warnings == []
    run = server.runs["run-1"]
    assert [row["step"] for row in run["history"]] == list(range(1, 201))
    assert [row["train/loss"] for row in run["history"]] == [1 / step for step in range(1, 201)]
    assert run["summary"]["val/loss"] == 2.5
    assert run["config"]["model.name"] == "llama_tiny"
    assert (run["name"], run["group"], run["exit_code"]) == ("a run", "sizes", 7)
    assert logger.place == f"{server.url}/me/rsotrain/runs/run-1"


def test_wandb_online_resume_continues_the_same_run(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    server = connect()
    for steps, exit_code in ((range(1, 6), 1), (range(4, 9), 0)):  # from the checkpoint of step 3
        logger = wandb_runs()
        for step in steps:
            logger.log({"train/loss": 1 / step}, step)
        logger.close({}, exit_code)
    assert wandb_runs.warnings == []
    assert list(server.runs) == ["run-1"]
    assert [row["step"] for row in server.runs["run-1"]["history"]] == list(range(1, 9))
    assert server.runs["run-1"]["exit_code"] == 0


def test_wandb_sweep_decides_the_id(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = connect()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial-7")
    logger = wandb_runs()
    logger.log({"val/loss": 2.0}, 1)
    logger.close({}, 0)
    assert wandb_runs.warnings == []
    assert [row["val/loss"] for row in server.runs["trial-7"]["history"]] == [2.0]


@pytest.mark.parametrize("options", [{"status": 401}, {"silent": True}], ids=["refuses", "never answers"])
def test_wandb_falls_back_to_offline_with_one_warning(
    options: dict[str, Any], wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    server = connect(**options)
    logger = wandb_runs(init_timeout_seconds=2.0)
    log_unhindered(logger)
    until(lambda: logger.place is not None)
    logger.close({}, 0)
    assert server.runs == {}
    (warning,) = wandb_runs.warnings
    assert "not reachable" in warning
    assert str(logger.place) in warning
    assert len(wandb_runs.offline_history()) == 200


@pytest.mark.slow
def test_wandb_falls_back_when_nobody_listens(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    connect().vanish()
    logger = wandb_runs(WandbMode.online, init_timeout_seconds=2.0)
    log_unhindered(logger)
    until(lambda: logger.place is not None)
    logger.close({}, 0)
    assert len(wandb_runs.warnings) == 1
    assert len(wandb_runs.offline_history()) == 200


@pytest.mark.slow
def test_wandb_server_that_vanishes_costs_one_warning(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    server = connect()
    logger = wandb_runs(close_timeout_seconds=3.0)
    until(lambda: logger.place is not None)
    server.vanish()
    log_unhindered(logger)
    start = time.monotonic()
    logger.close({}, 0)
    assert time.monotonic() - start < 4.0
    (warning,) = wandb_runs.warnings
    assert "wandb sync" in warning


def test_wandb_service_that_dies_costs_one_warning_and_not_the_next_run(wandb_runs: Wandb) -> None:
    import wandb

    logger = wandb_runs()
    until(lambda: logger.place is not None)
    service = wandb.setup()._connection._proc._process  # nothing public leads to it
    service.kill()
    service.wait(10)
    log_unhindered(logger)
    until(lambda: wandb_runs.warnings)
    logger.close({}, 0)
    assert len(wandb_runs.warnings) == 1
    assert "off for the rest of the run" in wandb_runs.warnings[0]

    second = Wandb(wandb_runs.folder / "second")
    second.folder.mkdir()
    logger = second()
    log_unhindered(logger, 5)
    logger.close({}, 0)
    assert second.warnings == []
    assert len(second.offline_history()) == 5


def test_wandb_that_cannot_be_imported_costs_one_warning(
    wandb_runs: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = wandb_runs()
    until(lambda: wandb_runs.warnings)
    log_unhindered(logger)
    logger.close({"val/loss": 1.0}, 0)
    (warning,) = wandb_runs.warnings
    assert "off for the rest of the run" in warning
    assert logger.place is None


@pytest.mark.parametrize(("key", "reason"), [(None, "wandb login"), ("short", "AuthenticationError")])
def test_wandb_online_without_a_usable_key_goes_offline(
    key: str | None, reason: str, wandb_runs: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    logger = wandb_runs(WandbMode.online)
    until(lambda: logger.place is not None)
    logger.close({}, 0)
    (warning,) = wandb_runs.warnings
    assert reason in warning
    assert "offline" in warning


def test_wandb_full_queue_drops_with_a_warning_and_a_count(
    wandb_runs: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, held = WandbLogger._start, threading.Event()

    def slow_start(self: WandbLogger, wandb: Any) -> Any:
        held.wait(30)
        return start(self, wandb)

    monkeypatch.setattr(WandbLogger, "_start", slow_start)
    logger = wandb_runs(max_queued=8)
    log_unhindered(logger, 20)
    assert len(wandb_runs.warnings) == 1
    held.set()
    logger.close({}, 0)
    assert len(wandb_runs.warnings) == 2
    assert "missed 12 records" in wandb_runs.warnings[1]
    assert [row["step"] for row in wandb_runs.offline_history()] == list(range(1, 9))


@pytest.mark.slow
def test_wandb_close_gives_up_on_a_start_that_hangs(
    wandb_runs: Wandb, connect: Callable[..., FakeWandbServer]
) -> None:
    server = connect(silent=True)
    logger = wandb_runs(init_timeout_seconds=4.0, close_timeout_seconds=1.0)
    log_unhindered(logger, 5)
    start = time.monotonic()
    logger.close({}, 0)
    assert time.monotonic() - start < 2.0
    assert "left alone" in wandb_runs.warnings[0]
    logger._thread.join(30)  # its own timeout ends it, quietly
    assert server.runs == {}
    assert len(wandb_runs.warnings) == 1


def test_wandb_leaves_the_end_of_the_process_alone(wandb_runs: Wandb, tmp_path: Path) -> None:
    before, register = (sys.exit, sys.excepthook), atexit.register
    logger = wandb_runs()
    until(lambda: logger.place is not None)
    until(lambda: atexit.register is register)
    assert (sys.exit, sys.excepthook) == before
    logger.close({}, 0)
    # A process that forgets to close its logger, its server gone: nothing keeps it from exiting.
    code = (
        "import sys, time; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from helpers.fake_wandb_server import FakeWandbServer\n"
        "from rsotrain.config.schema import WandbMode\n"
        "from rsotrain.tracking.wandb_logger import WandbLogger\n"
        "import os; server = FakeWandbServer(); os.environ['WANDB_BASE_URL'] = server.url\n"
        "logger = WandbLogger(mode=WandbMode.online, run_dir=Path(sys.argv[2]), run_id='r', run_name='n',\n"
        "                     project='p', flat_config={}, warn=print)\n"
        "while logger.place is None: time.sleep(0.01)\n"
        "logger.log({'train/loss': 1.0}, 1); server.vanish()\n"
        "print(time.time(), flush=True); sys.exit(5)\n"
    )
    folder = tmp_path / "other"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT / "tests"), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"WANDB_API_KEY": API_KEY},
    )
    assert process.wait(60) == 5
    assert process.stdout is not None
    assert time.time() - float(process.stdout.readline()) < 3.0
    process.stdout.close()


def build(folder: Path, warnings: list[str] | None = None, **options: Any) -> Loggers:
    return build_loggers(
        LoggerConfig(name="test", **options),
        run_dir=folder,
        run_id="run-1",
        run_name="a run",
        flat_config={"optimizer.lr": 0.01},
        resume_step=None,
        warn=[].append if warnings is None else warnings.append,
    )


def test_build_loggers_writes_the_same_records_to_all(wandb_runs: Wandb) -> None:
    loggers = build(wandb_runs.folder, wandb_runs.warnings, wandb=True)
    loggers.log({"train/loss": 1.5, "tokens": 64}, 1)
    loggers.close({"val/loss": 1.0}, 0)
    (row,) = wandb_runs.offline_history()
    (line,) = records(wandb_runs.folder / "metrics.jsonl")
    assert line == {key: row[key] for key in line} == {"step": 1, "train/loss": 1.5, "tokens": 64}
    places = loggers.places()
    assert places["metrics"] == wandb_runs.folder / "metrics.jsonl"
    assert Path(places["wandb"]).is_dir()
    assert wandb_runs.warnings == []


def test_samples_are_a_table_of_the_same_step(wandb_runs: Wandb) -> None:
    loggers = build(wandb_runs.folder, wandb_runs.warnings, wandb=True)
    loggers.log({"val/loss": 1.5}, 3)
    loggers.log_table("val/samples", ("prompt", "continuation"), [("The", " whale"), ("", "é")], 3)
    loggers.close({}, 0)
    (row,) = wandb_runs.offline_history()
    assert (row["val/loss"], row["step"]) == (1.5, 3)
    (file,) = wandb_runs.folder.glob("wandb/offline-run-*/files/media/table/val/samples*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["prompt", "continuation"]
    assert table["data"] == [["The", " whale"], ["", "é"]]
    assert "val/samples" not in records(wandb_runs.folder / "metrics.jsonl")[0]
    assert wandb_runs.warnings == []


def test_without_wandb_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rsotrain.config.schema import LoggerConfig, Progress\n"
        "from rsotrain.tracking.loggers import build_loggers\n"
        "from rsotrain.tracking.display import build_display\n"
        "build_loggers(LoggerConfig(name='jsonl'), run_dir=Path(sys.argv[1]), run_id='r', run_name='n',\n"
        "              flat_config={}, resume_step=None, warn=print)\n"
        "build_display(Progress.plain, 10)\n"
        "print(sorted({'wandb', 'torch', 'rich'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, timeout=60, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
