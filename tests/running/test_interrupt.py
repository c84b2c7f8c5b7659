"""Signals: which of them a run takes over, and what happens to those that come outside of training."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import call_main

from rsotrain.cli import entry
from rsotrain.errors import INTERRUPTED_STATUS, Interrupted
from rsotrain.running.interrupt import FOREIGN, StopRequest, leaving_at_once


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_the_reason() -> None:
    stop = StopRequest(None)
    with stop.listening():
        assert stop.reason() is None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.reason() == "SIGUSR1"
        assert stop.signal is signal.SIGUSR1
    assert Interrupted(signal.SIGUSR1).code == INTERRUPTED_STATUS == 75


def test_a_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(None).listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # whatever the process waits for
    assert signal.getsignal(signal.SIGINT) is before


def test_a_launchers_own_signal_is_taken_over_and_handed_back() -> None:
    came: list[int] = []
    signal.signal(FOREIGN, lambda number, frame: came.append(number))
    stop = StopRequest(None)
    with stop.listening():
        os.kill(os.getpid(), FOREIGN)
    assert (stop.reason(), came) == ("SIGUSR2", [])
    signal.raise_signal(FOREIGN)
    assert came == [FOREIGN]


def test_a_signal_that_nobody_handles_is_left_alone() -> None:
    signal.signal(FOREIGN, signal.SIG_DFL)
    with StopRequest(None).listening():
        assert signal.getsignal(FOREIGN) is signal.SIG_DFL


def test_a_lost_terminal_is_a_request_to_stop_unless_it_was_to_be_ignored() -> None:
    stop = StopRequest(None)
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
    assert stop.reason() == "SIGHUP"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    stop = StopRequest(None)
    with stop.listening():
        signal.raise_signal(signal.SIGHUP)
    assert stop.reason() is None


def test_a_warning_outside_of_training_asks_to_be_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest(None)
    with leaving_at_once():
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)  # in training: at the end of the step
        assert stop.reason() == "SIGUSR1"
        with pytest.raises(Interrupted) as ended:
            os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.value.signal_number == signal.SIGUSR1
    assert capfd.readouterr().err.count("the same command starts again") == 1


# --- Ctrl-C before the first step -------------------------------------------------------------------


def press_ctrl_c(*_: object, **__: object) -> None:
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("went on")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "rsotrain.data.build_tokenizer.train_tokenizer_apart",
        "rsotrain.data.tokens.encode_documents",
        "rsotrain.training.model.build_model",
        "rsotrain.running.run.resume",
    ],
)
def test_ctrl_c_in_preparation_leaves_a_sentence_and_nothing_half_written(
    place: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = [*tiny, "optimizer=adam", "run_name=r", "cache_dir=cache", "steps=2"]
    with monkeypatch.context() as patched:
        patched.setattr(place, press_ctrl_c)
        assert call_main(entry, command) == 130
    said = capsys.readouterr().err
    assert said == "rsotrain: stopped by Ctrl-C outside of training; the same command starts again\n"
    assert not (tmp_path / "outputs").exists()
    assert list((tmp_path / "cache/tmp").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one would not have waited
    assert call_main(entry, command) == 0
    assert "broken" not in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_before_a_run_goes_on_leaves_what_it_has(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*tiny, "optimizer=adam", "run_name=r", "steps=4"]
    assert call_main(entry, command) == 0
    (tmp_path / "outputs/r/summary.json").unlink()
    before = sorted((tmp_path / "outputs/r").rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr("rsotrain.training.model.build_model", press_ctrl_c)
        assert call_main(entry, command) == 130
    assert sorted((tmp_path / "outputs/r").rglob("*")) == before
    assert json.loads((tmp_path / "outputs/r/run.json").read_text())["state"] == "stopped"


def test_torchruns_repetition_of_ctrl_c_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopRequest(None).listening() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "SIGINT"
    with leaving_at_once():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_a_process_in_the_background_stays_deaf_to_ctrl_c_outside_of_training() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with leaving_at_once():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
