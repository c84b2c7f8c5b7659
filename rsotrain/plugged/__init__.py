"""The package whose modules are the files of a user's own optimizers, in a folder given by ``--config-dir``.

``rsotrain.cli.plugins`` says which folder that is. It says so in the environment: a process that a launcher
starts unpickles settings of a class of such a module, and imports the module for that, before any command
line is read.
"""

import os

FOLDER = "RSOTRAIN_PLUGGED"  # holds the folder of the files

__path__[:] = [os.environ[FOLDER]] if FOLDER in os.environ else []


def is_plugged(settings: type) -> bool:
    """Is this class of settings in a file of the user's own?"""
    return settings.__module__.startswith(f"{__name__}.")
