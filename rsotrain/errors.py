"""The exceptions that end a run with one sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence that names it and the fix.

    The command line prints it without a traceback and exits with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, and the code is not at fault: a loss that is not finite, say.

    The command line prints it without a traceback and exits with status 1.
    """
