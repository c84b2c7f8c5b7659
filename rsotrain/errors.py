"""The exceptions that end a run with one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence that names it and the fix.

    The command line prints it without a traceback and exits with status 2.
    """


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise UserError(sentence)


class TrainingError(RuntimeError):
    """Training cannot go on, and the code is not at fault: a loss that is not finite, say.

    The command line prints it without a traceback and exits with status 1.
    """


class NonFiniteError(TrainingError):
    """Loss, gradient norm, weights or states are not numbers any more."""


class LostRankError(TrainingError):
    """Another process of the run has ended or cannot be reached; each of those left says so."""


# sysexits.h EX_TEMPFAIL: stopped before the end with everything saved; the same command goes on.
INTERRUPTED_STATUS = 75


class StoppedEarly(Exception):  # noqa: N818 (it is no error)
    """The run's time budget is spent and everything is saved; exits with ``INTERRUPTED_STATUS``."""


class Interrupted(SystemExit):
    """A signal has stopped the run, and everything is saved; ends the process with ``INTERRUPTED_STATUS``.

    ``signal_number``: None where it came to another rank.
    """

    def __init__(self, signal_number: int | None) -> None:
        super().__init__(INTERRUPTED_STATUS)
        self.signal_number = signal_number
