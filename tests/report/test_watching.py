"""--watch and --live go on, whatever appears in the folder that they look at, and say so."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.report_harness import Make, call

from rsotrain.errors import UserError

ALIVE = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds a look, and have tests of their own."""
    monkeypatch.setattr("rsotrain.report.plots.draw", lambda *_: {})


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@contextmanager
def reporting(*arguments: str | Path) -> Iterator[list[BaseException]]:
    """The command beside the test; what it raised, after the block."""
    raised: list[BaseException] = []

    def follow() -> None:
        try:
            call(*arguments, "--every", "0.05")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield raised
    finally:
        thread.join(60)
    assert not thread.is_alive()


def finish(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"finished": True, "val/loss": 1.25}))


def test_watch_leaves_out_what_cannot_be_compared_and_says_so(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going, page = make("m", finished=False, record=ALIVE), tmp_path / "out/report.html"
    with reporting(going.parent, "--out", tmp_path / "out", "--watch") as raised:
        until(page.exists)
        make("a", seq_len=64)  # before the first one in the order of names
        until(lambda: "left out: a, whose validation loss cannot be compared with" in page.read_text())
        make("b", 3.0, optimizer__name="galore")
        until(lambda: "2 runs" in page.read_text())
        finish(going)
    assert raised == []
    text = page.read_text()
    assert "1.2500" in text
    assert "http-equiv" not in text
    assert "left out: a, whose" in (tmp_path / "out/report.md").read_text()
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "rsotrain-report: left out: a, whose validation loss cannot be compared with that of m"
        " (seq_len is 32 there and 64 here; --mixed marks such runs)"
    ]


def test_watch_leaves_out_what_cannot_be_read(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going, page = make("m", finished=False, record=ALIVE), tmp_path / "out/report.html"
    with reporting(going.parent, "--out", tmp_path / "out", "--watch") as raised:
        until(page.exists)
        torn = make("torn")
        whole = (torn / "config.yaml").read_text()
        (torn / "config.yaml").write_text("{")
        until(lambda: "torn/config.yaml is damaged" in page.read_text())
        (torn / "config.yaml").write_text(whole)  # it was being written
        until(lambda: "is damaged" not in page.read_text())
        finish(going)
    assert raised == []
    assert capsys.readouterr().err.count("torn/config.yaml is damaged") == 1


def test_watch_goes_on_when_a_report_could_not_be_written(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going, out = make("m", finished=False, record=ALIVE), tmp_path / "out"
    with reporting(going.parent, "--out", out, "--watch") as raised:
        until((out / "report.csv").exists)  # the last
        out.rename(tmp_path / "moved")
        out.write_text("in the way")
        said = ""

        def has_been_said() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "cannot be written" in said

        until(has_been_said)
        out.unlink()
        until((out / "report.html").exists)
        finish(going)
    assert raised == []


def test_watch_waits_for_the_first_step(make: Make, tmp_path: Path) -> None:
    starting, page = make("m", finished=False, record=ALIVE), tmp_path / "out/report.html"
    metrics = (starting / "metrics.jsonl").read_text()
    (starting / "metrics.jsonl").write_text("")
    with reporting(starting.parent, "--out", tmp_path / "out", "--watch") as raised:
        time.sleep(0.2)
        assert not page.exists()
        (starting / "metrics.jsonl").write_text(metrics)
        until(page.exists)
        finish(starting)
    assert raised == []


def test_what_cannot_be_compared_from_the_start_is_a_mistake(make: Make, tmp_path: Path) -> None:
    make("a", seq_len=64)
    folder = make("m", finished=False, record=ALIVE).parent
    for mode in ("--watch", "--live"):
        with pytest.raises(UserError, match="a and m cannot be compared"):
            call(folder, mode)


def test_watch_ends_when_its_folder_has_gone(make: Make, tmp_path: Path) -> None:
    going = make("m", finished=False, record=ALIVE)
    with reporting(going.parent, "--out", tmp_path / "out", "--watch") as raised:
        until((tmp_path / "out/report.html").exists)
        going.parent.rename(tmp_path / "moved")
    assert "outputs is not a folder" in str(raised)


def test_live_leaves_out_what_cannot_be_compared_at_the_end(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make("z", 2.0, optimizer__name="galore")
    going = make("m", finished=False, record=ALIVE)
    with reporting(going.parent, "--live") as raised:
        time.sleep(0.1)
        make("a", seq_len=64)
        finish(going)
    assert raised == []
    printed = capsys.readouterr()
    assert "left out: a, whose validation loss cannot be compared" in printed.err + printed.out
    comparison = printed.out[printed.out.index("Comparison") :]
    assert "galore" in comparison
    assert "seq_len=64" not in comparison


def test_watch_says_that_there_are_no_claims_yet(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going = make("m", finished=False, record=ALIVE, optimizer__name="muon")
    page = tmp_path / "out/report.html"
    with reporting(going.parent, "--out", tmp_path / "out", "--watch", "--claims") as raised:
        until(page.exists)
        make("a", 2.0)
        until(lambda: "The papers" in page.read_text())
        finish(going)
    assert raised == []
    assert capsys.readouterr().err.count("no run is of one") == 1
