"""The real `wandb sweep` and `wandb agent` on the files of sweeps/, against the stand-in of W&B's server."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import ROOT
from helpers.fake_wandb_server import FakeWandbServer

API_KEY = "a" * 40
AGENTS: list[subprocess.Popen[str]] = []


@pytest.fixture
def server() -> Iterator[FakeWandbServer]:
    server = FakeWandbServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_agents_left() -> Iterator[None]:
    """A test that fails leaves no agent and no member behind."""
    yield
    for process in AGENTS:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # which the agent forwards
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    AGENTS.clear()


def environment(server: FakeWandbServer, folder: Path) -> dict[str, str]:
    """Without the developer's own W&B; ``rsotrain`` is the one beside this interpreter."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    own = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY, "HOME": str(folder), "PATH": path}
    return clean | own


def create(server: FakeWandbServer, folder: Path, name: str, tiny: list[str], **changes: Any) -> str:
    """`wandb sweep` of a shipped file whose members are made tiny; the sweep's id."""
    sweep = yaml.safe_load((ROOT / "sweeps" / name).read_text())
    small = dict(override.split("=", 1) for override in tiny)
    del small["logger"]  # online, as in a sweep of the file itself
    fixed = {key: {"value": yaml.safe_load(value)} for key, value in small.items()}
    sweep["parameters"] = fixed | sweep["parameters"] | {"eval_every": {"value": 2}} | changes
    (folder / name).write_text(yaml.safe_dump(sweep))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", name],
        cwd=folder, env=environment(server, folder), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"wandb agent me/rsotrain/(\S+)", done.stderr)
    assert found is not None, done.stderr
    return found[1]


def agent(server: FakeWandbServer, folder: Path, sweep: str, count: int) -> subprocess.Popen[str]:
    """The agent of a job: it forwards the signals of a scheduler."""
    command = ["agent", "--forward-signals", f"--count={count}", f"me/rsotrain/{sweep}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "wandb", *command],
        cwd=folder, env=environment(server, folder), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    AGENTS.append(process)
    return process


def until(condition: Callable[[], object], seconds: float = 280.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("outputs/*/summary.json")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"), [pytest.param("optimizers.yaml", 2, marks=pytest.mark.long), ("learning_rate.yaml", 1)]
)
def test_members_of_a_shipped_sweep_arrive(
    name: str, count: int, server: FakeWandbServer, tmp_path: Path, tiny: list[str]
) -> None:
    sweep = create(server, tmp_path, name, tiny)
    process = agent(server, tmp_path, sweep, count)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    started = server.sweeps.sweeps[sweep].started
    assert list(server.runs) == list(started) == [f"member{i}" for i in range(count)]
    written = summaries(tmp_path)
    for run_id, parameters in started.items():
        run = server.runs[run_id]
        assert (run["exit_code"], run["sweep"]) == (0, sweep)
        for key, value in parameters.items():
            group = key in ("model", "optimizer", "sampler", "data")
            assert run["config"][f"{key}.name" if group else key] == value
        assert [row["step"] for row in run["history"] if "val/loss" in row] == [2, 4, 6]
        (folder,) = (folder for folder in written if folder.endswith(run_id))
        assert run["summary"]["val/loss"] == written[folder]["val/loss"]
    assert len(written) == count


@pytest.mark.long
def test_a_preempted_member_is_started_again_and_goes_on(
    server: FakeWandbServer, tmp_path: Path, tiny: list[str]
) -> None:
    long = {"steps": {"value": 400}, "save_every": {"value": None}, "eval_every": {"value": 100}}
    one = {"optimizer.lr": {"value": 0.01}, "optimizer.scale": {"value": 0.1}}
    sweep = create(server, tmp_path, "learning_rate.yaml", tiny, **long, **one)
    process = agent(server, tmp_path, sweep, count=2)
    until(lambda: [p for p in tmp_path.glob("outputs/*member0/metrics.jsonl") if p.stat().st_size])
    process.send_signal(signal.SIGUSR1)  # as a scheduler does to a batch script
    out, _ = process.communicate(timeout=280)
    assert "stopped by SIGUSR1" in out
    assert "resumed from" in out
    assert list(server.runs) == ["member0"]
    run = server.runs["member0"]
    assert run["exit_code"] == 0
    steps = [row["step"] for row in run["history"]]
    assert sorted(set(steps)) == list(range(1, 401))
    (summary,) = summaries(tmp_path).values()
    assert run["summary"]["val/loss"] == summary["val/loss"]


@pytest.mark.long
def test_a_member_that_is_ended_early_is_saved_and_not_started_again(
    server: FakeWandbServer, tmp_path: Path, tiny: list[str]
) -> None:
    long = {"steps": {"value": 100_000}, "save_every": {"value": None}, "run_name": {"value": "r"}}
    sweep = create(server, tmp_path, "learning_rate.yaml", tiny, **long)
    process = agent(server, tmp_path, sweep, count=1)
    until(lambda: server.runs.get("member0", {}).get("history"))
    server.sweeps.sweeps[sweep].stop.append("member0")
    out, _ = process.communicate(timeout=280)
    assert "stopped by SIGTERM" in out
    assert server.runs["member0"]["exit_code"] == 75
    assert not server.sweeps.sweeps[sweep].again
    assert len(list((tmp_path / "outputs/r-member0/checkpoints").iterdir())) == 1


@pytest.mark.long
def test_a_server_that_vanishes_does_not_stop_a_member(
    server: FakeWandbServer, tmp_path: Path, tiny: list[str]
) -> None:
    environment_of_a_member = environment(server, tmp_path) | {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "m"}
    overrides = [o for o in tiny if not o.startswith(("logger=", "steps="))]
    process = subprocess.Popen(
        [sys.executable, "-m", "rsotrain", *overrides, "steps=600", "logger.wandb_init_timeout_seconds=5"],
        cwd=tmp_path, env=environment_of_a_member, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: "m" in server.runs)
    server.vanish()
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0
    assert out.count("wandb sync") == 1
    (summary,) = summaries(tmp_path).values()
    assert summary["step"] == 600
