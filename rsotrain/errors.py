"""The exceptions that end a run with one sentence instead of a traceback."""

import re
import unicodedata


class UserError(ValueError):
    """A mistake that the user can mend: one sentence that names it and the fix.

    The command line prints it without a traceback and exits with status 2.
    """


_LONGEST_WORD, _LONGEST_SENTENCE = 300, 1500  # characters


def one_line(sentence: str) -> str:
    """``sentence`` as it is shown: control characters spelled out, what a user gave at length shortened."""
    shown = "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs")
        else character
        for character in sentence
    )
    shown = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _shortened(word[0], _LONGEST_WORD), shown)
    return _shortened(shown, _LONGEST_SENTENCE)


def _shortened(text: str, length: int) -> str:
    """Its begin, which names the key, and its end, which has the advice."""
    if len(text) <= length:
        return text
    return f"{text[: length * 2 // 3]} […] {text[-length // 4 :]}"


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise UserError(sentence)


class TrainingError(RuntimeError):
    """Training cannot go on, and the code is not at fault: a loss that is not finite, say.

    The command line prints it without a traceback and exits with status 1.
    """


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
