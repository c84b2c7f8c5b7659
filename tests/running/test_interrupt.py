"""Signals: which of them a run takes over, and what happens to those that come outside of training."""

import os
import signal
from collections.abc import Iterator

import pytest

from rsotrain.errors import INTERRUPTED_STATUS, Interrupted
from rsotrain.running.interrupt import FOREIGN, StopRequest, leaving_on_warning


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
    with leaving_on_warning():
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)  # in training: at the end of the step
        assert stop.reason() == "SIGUSR1"
        with pytest.raises(Interrupted) as ended:
            os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.value.signal_number == signal.SIGUSR1
    assert capfd.readouterr().err.count("the same command starts again") == 1
