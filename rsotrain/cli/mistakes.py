"""One sentence for whatever is wrong with a command line, a YAML file or a run."""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from rsotrain.cli.hints import unknown_key
from rsotrain.cli.overrides import chosen_options
from rsotrain.cli.values import wrong_value
from rsotrain.config.defaults import conf_dir
from rsotrain.config.keys import did_you_mean, field_types, kinds, known_keys
from rsotrain.config.schema import SCHEMAS, Mode
from rsotrain.errors import LostRankError, TrainingError, UserError
from rsotrain.tracking.escaping import one_line, print_line

FULL_ERROR = "HYDRA_FULL_ERROR"
_PATIENCE_SECONDS = 5.0
_READERS = ("hydra", "omegaconf", "antlr4")  # packages that read what the user gives
_MISFIT = re.compile(
    r"In '((?:experiment|tuned)/.+)': (\w+) raised while composing config:\n(.+)\n"
    r"\s+full_key: (\S+)\n(?:\s+reference_type=.+\n)?\s+object_type=(\w+)"
)


_NO_SCHEMA = re.compile(r"In '(.+?)': Could not (?:load|find) '/?schema/(.+?)/(.+?)'")


def _unregistered(file: str, group: str, schema: str) -> str:
    registry = {"optimizer": "methods.py", "sampler": "samplers.py"}.get(group, "schema.py")
    beside = f", and no {file}.py beside it" if group == "optimizer" else ""
    return (
        f"{file}.yaml names the schema {schema}, which nothing in rsotrain/config/{registry} registers"
        f"{beside}"
        f" (there are: {', '.join(sorted(SCHEMAS.get(group, ())))})"
    )


def say(error: Exception) -> None:
    """Print the sentence. Of several processes on a node the first does so at once.

    The others wait a little: if it has failed, too, torchrun has ended them by then.
    """
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank.isdecimal() and int(rank) > 0 and not isinstance(error, LostRankError):
        time.sleep(_PATIENCE_SECONDS)
    sentence = one_line(explain(error))
    print_line(f"rsotrain: {sentence}", sys.stderr)
    _tell_torchrun(sentence)


def say_interrupted() -> None:
    """After Ctrl-C, which comes to all processes of a node: the first speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_line(
            "rsotrain: stopped by Ctrl-C outside of training; the same command starts again", sys.stderr
        )


def _tell_torchrun(sentence: str) -> None:
    """torchrun ends with a report of its own, whose last lines say what this file says."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            said = {"message": f"rsotrain: {sentence}", "timestamp": int(time.time())}
            Path(file).write_text(json.dumps(said))


def explain(error: Exception, given: Sequence[str] | None = None) -> str:
    """One sentence for a mistake in the command line or in a YAML file.

    ``given``: the overrides; None: those of this process.
    """
    arguments = sys.argv[1:] if given is None else given
    if isinstance(error, UserError | TrainingError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        if missing := _NO_SCHEMA.search(str(error)):
            return _unregistered(*missing.groups())
        if error.options is None:
            return " ".join(str(error).split("\n\n")[0].split())
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [o for o in error.options if not o.startswith("schema")]
        near = did_you_mean(option, options)
        return f"{group}={option} does not exist{near} (there are: {', '.join(options)})"
    if isinstance(error, OverrideParseException):
        if re.fullmatch(r"[\w-]+", error.override or ""):
            return _bare_word(error.override)
        return (
            f"{error.override!r} is not of the form key=value"
            " (quote values that contain spaces, commas, brackets or '=' as key=\"'…'\")"
        )
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
        return f"{where}not valid YAML ({getattr(error, 'problem', error)})"
    if (mistake := _users_own(error)) is not None:  # raised by a resolver
        return str(mistake)
    if misfit := _MISFIT.match(str(error)):
        source, kind, text, key, schema = misfit.groups()
        experiments = [path.stem for path in (conf_dir() / "experiment").glob("*.yaml")]
        reason = "" if kind == "ConfigKeyError" else text
        return explain_misfit(source, key, reason, schema, arguments, experiments)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return _of_another_kind(error)
    lines = str(cause).split("\n")
    text = " ".join(lines[:2] if lines[0].endswith("composing config:") else lines[:1])
    key = getattr(cause, "full_key", None)
    if unknown := re.match(r"(?:Key '(.+?)' (?:is )?not in|Could not override '(.+?)')", text):
        key = key or unknown[1] or unknown[2]
        node = getattr(cause, "parent_node", None)
        composed = None if node is None else node._get_root()
        return unknown_key(key, composed, chosen_options(arguments))
    if several := re.match(r"Ambiguous value for argument '(.+?)'", text):
        return f"{several[1]} is several runs; start them with rsotrain -m …"
    if unresolved := re.match(r"Error resolving interpolation '(.+?)'", text):  # in the choice of an option
        key = next((word.partition("=")[0] for word in arguments if unresolved[1] in word), None)
    if text.startswith("Cannot assign"):  # an item to a list of mappings; OmegaConf does not say to which
        key = next(name for name, types in field_types().items() if Any in set().union(*map(kinds, types)))
    if key and (sentence := wrong_value(key, text)) is not None:
        return sentence
    return f"{key}: {text}" if key else " ".join(text.split())


def _bare_word(word: str) -> str:
    """The sentence for a word without a value: train, optimizer, help."""
    meant = f"mode={word}" if word in Mode.__members__ else f"{word}=…" if word in known_keys() else ""
    say = f"; say {meant}" if meant else "; rsotrain --help lists all keys"
    return f"{word!r} is not of the form key=value{say}"


def _users_own(error: BaseException | None) -> UserError | None:
    """The UserError that ``error`` was raised from."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _of_another_kind(error: Exception) -> str:
    """Hydra itself has no sentence for the mistake."""
    if isinstance(error, OSError) and error.filename is not None:
        given = [argument.partition("=") for argument in sys.argv[1:]]
        keys = [f"{key}: " for key, _, value in given if value and str(error.filename).startswith(value)]
        return f"{keys[0] if keys else ''}{error.filename} cannot be written: {error.strerror}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"Hydra cannot read this command line ({reason}); {FULL_ERROR}=1 shows where it stopped"


def is_hydras(error: Exception) -> bool:
    """Whether Hydra, in reading the command line or a file, raised ``error``, and not the package."""
    last = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        last = package if package in (*_READERS, "rsotrain", "hydra_plugins") else last
    return last in _READERS


def explain_misfit(
    source: str, key: str, reason: str, schema: str, arguments: Sequence[str], options: Sequence[str]
) -> str:
    """The sentence for a key in a file of conf/experiment or conf/tuned that the choice of a group lacks.

    ``source``: experiment or tuned, and its file: experiment/galore_60m. ``reason``: why the value of ``key``
    is refused, empty where there is no such key. ``schema``: the class of the chosen option.
    ``arguments``: the command line. ``options``: the files of conf/experiment.
    """
    folder, _, name = source.partition("/")
    if key not in known_keys():
        return f"{source}.yaml: unknown key {key}{did_you_mean(key, known_keys())}"
    chosen = {group: value for group, value in chosen_options(arguments).items() if "," not in value}
    name = chosen.get(folder, name)  # what the user called, where the file is one that it builds on
    group = key.split(".")[0]
    option = chosen.get(group)
    if option is None:  # chosen by another file: all that is known is its class
        names = [n for n, c in SCHEMAS.get(group, {}).items() if c.__name__ == schema]
        option = names[0] if names else schema
    found = f"{folder}={name} sets {key}, " + (
        f"which {group}={option} refuses ({reason})" if reason else f"which {group}={option} does not have"
    )
    culprit = next((g for g in (group, "optimizer") if g in chosen and group in (g, "sampler")), None)
    if culprit is None:
        return f"{found}; leave {folder}={name} out"
    other = chosen[culprit] if folder == "tuned" else f"{chosen[culprit]}_{name.rsplit('_', 1)[-1]}"
    take = culprit == "optimizer" and (folder == "tuned" or {name, other} <= set(options))
    leave = f"leave {culprit}={chosen[culprit]} out"
    return f"{found}; take {folder}={other} or {leave}" if take else f"{found}; {leave}"
