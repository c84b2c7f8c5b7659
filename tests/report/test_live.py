"""Reports of runs that go on, have stopped or are lost, and of W&B's offline runs."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.report_harness import Make, call

from rsotrain.errors import UserError
from rsotrain.report.comparison import compare
from rsotrain.report.live import runs_table
from rsotrain.report.runs import read_run, read_runs
from rsotrain.report.wandb_offline import OfflineRun
from rsotrain.report.watching import looks
from rsotrain.tracking.run_files import RunState


def test_what_a_run_is_at(make: Make) -> None:
    here = {"state": "running", "host": socket.gethostname()}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    elsewhere = {"state": "running", "host": "another", "pid": 1}
    states = {
        "finished": ({}, True, RunState.finished),
        "running": (here | {"pid": os.getpid()}, False, RunState.running),
        "lost": (here | {"pid": gone.pid}, False, RunState.lost),
        "failed": ({"state": "failed"}, False, RunState.failed),
        "nobody": (here | {"pid": 0}, False, RunState.lost),
        "damaged": (here | {"pid": 10**30}, False, RunState.lost),
        "elsewhere": (elsewhere, False, RunState.running),
        "silent": (elsewhere, False, RunState.lost),
    }
    for name, (record, finished, state) in states.items():
        folder = make(name, record=record, finished=finished)
        if name == "silent":
            os.utime(folder / "metrics.jsonl", (0, 0))
        assert read_run(folder).state is state, name


@pytest.mark.slow
def test_watch_draws_until_the_last_run_has_ended(make: Make, tmp_path: Path) -> None:
    alive = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    folder = make("a", finished=False, record=alive)
    out = tmp_path / "out"
    watcher = threading.Thread(target=call, args=(folder, "--out", out, "--watch", "--every", "0.1"))
    watcher.start()
    deadline = time.monotonic() + 60
    while not (out / "report.html").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert '<meta http-equiv="refresh" content="0.1">' in (out / "report.html").read_text()
    (folder / "summary.json").write_text(json.dumps({"finished": True, "val/loss": 1.25}))
    watcher.join(60)
    assert not watcher.is_alive()
    text = (out / "report.html").read_text()
    assert "1.2500" in text
    assert "http-equiv" not in text


def test_the_end_is_believed_when_it_is_seen_twice(make: Make) -> None:
    alive = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    first = make("a", finished=False, record=alive)
    look = looks([first.parent], 0.01)
    assert next(look)[1]
    (first / "summary.json").write_text('{"finished": true}')
    assert next(look)[1]  # between two members nothing runs
    starting = make("b", finished=False, record=alive)
    metrics = (starting / "metrics.jsonl").read_text()
    (starting / "metrics.jsonl").write_text("")
    for _ in range(3):  # the next one has not got to its first step
        runs, again = next(look)
        assert (len(runs), again) == (1, True)
    (starting / "metrics.jsonl").write_text(metrics)
    (starting / "summary.json").write_text('{"finished": true}')
    assert [(len(runs), again) for runs, again in look] == [(2, True), (2, False)]
    assert [again for _, again in looks([first], 0.01)] == [False]


def test_live_follows_the_runs(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    make("a", 2.0)
    alive = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    going = make("b", 3.0, finished=False, record=alive, optimizer__name="galore")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(runs_table(read_runs([going.parent]), 120))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "2 runs: 1 running, 1 finished"
    first, second = (line.replace("│", " ").split() for line in lines[4:6])
    assert first[:2] == ["galore", "running"]  # the running ones first
    # 10 s for the first 20 steps, so as many for the rest; losses and speed from the last line
    assert first[-6:] == ["50%", "10.0", "s", "24.0000", "23.0000", "200"]
    assert second[:2] == ["adam", "finished"]
    assert second[-4:] == ["100%", "3.0000", "2.0000", "200"]
    threading.Timer(0.3, lambda: (going / "summary.json").write_text('{"finished": true}')).start()
    call(going.parent, "--live", "--every", "0.1")
    printed = capsys.readouterr().out
    assert "Comparison" in printed
    assert "2 finished" in printed


@pytest.mark.parametrize(("width", "columns"), [(120, 7), (80, 7), (64, 6)])
def test_names_keep_their_room_in_a_narrow_terminal(width: int, columns: int, make: Make) -> None:
    from rich.console import Console

    alive = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    make("a", seed=1, finished=False, record=alive)
    folder = make("b", optimizer__name="galore").parent
    console = Console(width=width, file=io.StringIO())
    console.print(runs_table(read_runs([folder]), width))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 1 + 3 + 2 + 1  # title, heading, a line each, the lower border
    assert lines[2].count("│") == columns + 1
    assert [line.split("│")[1].strip() for line in lines[4:6]] == ["adam", "galore"]


@pytest.mark.slow
@pytest.mark.alone
def test_a_wandb_offline_folder_is_read_like_a_run_folder(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # an earlier test's, which has ended
    wandb = pytest.importorskip("wandb")
    local = read_run(make("a", 2.0))
    folders = []
    for first, last in ((0, 2), (1, 4)):  # stopped after 20 steps, on from the checkpoint of step 10
        settings = wandb.Settings(silent=True, console="off")
        run = wandb.init(
            mode="offline",
            dir=tmp_path,
            id="abc",
            name="a",
            project="p",
            config=dict(local.config),
            settings=settings,
        )
        folders.append(Path(run.dir).parent)
        for record in local.history[first:last]:
            run.log(dict(record), step=record["step"])
        if last == 4:
            run.summary.update(dict(local.summary))
        run.finish(exit_code=0 if last == 4 else 75)
        time.sleep(1.1)  # W&B names folders by the second
    (stopped,) = read_runs([folders[0]])
    assert (stopped.state, stopped.step) == (RunState.stopped, 20)
    (whole,) = read_runs([folders[0].parent])
    assert (whole.name, whole.state, dict(whole.config)) == ("a", RunState.finished, dict(local.config))
    assert list(whole.history) == list(local.history)
    assert compare([whole])[0].statistic("val/loss") == compare([local])[0].statistic("val/loss")
    run = wandb.init(mode="offline", dir=tmp_path, id="new", project="p", settings=settings)
    run.finish()
    empty = Path(run.dir).parent
    assert [run.name for run in read_runs([empty.parent])] == ["a"]  # not in the way of the other
    with pytest.raises(UserError, match="-new has no metrics"):
        read_runs([empty])


def test_what_an_offline_run_is_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "offline-run-1-a" / "run-a.wandb"
    log.parent.mkdir()
    log.write_text("")
    expected = {0: RunState.finished, 75: RunState.stopped, 1: RunState.failed, None: RunState.running}
    for code, state in expected.items():
        run = OfflineRun(log.parent, "a", history=[{"step": 1}], exit_code=code)
        monkeypatch.setattr("rsotrain.report.runs.read_offline_runs", lambda _, run=run: ([run], {}))
        assert read_runs([log.parent])[0].state is state
    os.utime(log, (0, 0))
    assert read_runs([log.parent])[0].state is RunState.lost
