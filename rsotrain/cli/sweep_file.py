"""Files that say what to run: lists of configurations for job arrays, and W&B's sweeps.

``python -m rsotrain.sweep_file FILE`` checks a file and says how many runs it is;
``python -m rsotrain.sweep_file FILE INDEX`` prints the overrides of one configuration, each ended by a NUL.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rsotrain.cli.hints import other_tools_name
from rsotrain.cli.text_keys import quote, read_yaml, restore_text
from rsotrain.config.keys import did_you_mean, flatten, keys_of, known_keys, list_of
from rsotrain.errors import UserError
from rsotrain.tracking.escaping import one_line, print_line

_KEY = re.compile(r"(?:\+{1,2}|~)?(?P<key>[A-Za-z_][\w./@]*)(?:=|$)")
_PLAIN = re.compile(r"[\w./+-]*", re.ASCII)  # what Hydra takes without quotes, whatever stands around it
ARGUMENTS = "${args_no_hyphens}"  # in a sweep's command: its parameters as key=value
METHODS = ("grid", "random", "bayes")
SWEEP_KEYS = (
    "command", "controller", "description", "early_terminate", "entity", "metric", "method", "name",
    "parameters", "program", "project", "run_cap",
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """``place``: line 3, or item 0 (line 1) of a YAML list; ``fault``: why it has no overrides."""

    place: str
    overrides: list[str]
    fault: str | None = None


def read_list(path: Path) -> list[list[str]]:
    """The configurations of a list: overrides in a line each, or a YAML list of such lines or of mappings.

    Empty lines and comments do not count. Raises UserError for a file that cannot be read, is empty, sets a
    key that does not exist, or several values of one.
    """
    configurations = numbered(path)
    faults = [f"{c.place}: {fault}" for c in configurations if (fault := _fault_of_keys(c))]
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")
    return [c.overrides for c in configurations]


def numbered(path: Path) -> list[Configuration]:
    """The configurations of a list, unchecked. Raises UserError for a file that is no list or is empty."""
    text = _read(path)
    if path.suffix in (".yaml", ".yml"):
        content = _parse(path, text)
        if not isinstance(content, list):
            raise UserError(f"{path} must be a YAML list, one configuration an item")
        starts = [node.start_mark.line + 1 for node in yaml.compose(text, yaml.SafeLoader).value]
        configurations = [
            _configuration(f"item {number} (line {line})", item)
            for number, (line, item) in enumerate(zip(starts, content, strict=True))
        ]
    else:
        configurations = [
            _configuration(f"line {number}", line)
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
    if not configurations:
        raise UserError(
            f"{path} holds no configuration; write overrides such as optimizer=galore seed=1 in it"
        )
    return configurations


def _fault_of_keys(configuration: Configuration) -> str | None:
    """What is wrong with the first override that cannot be right whatever the others choose."""
    if configuration.fault:
        return configuration.fault
    known = known_keys()
    for override in configuration.overrides:
        match = _KEY.match(override)
        if match is None:
            return f"{override!r} is not of the form key=value"
        key = list_of(match["key"])
        if key not in known and not key.startswith("hydra"):
            return f"unknown key {key}{other_tools_name(key, known) or did_you_mean(key, known)}"
        if _is_sweep(override):
            return f"{override} is several runs; write a configuration for each"
    return None


def configuration(path: Path, index: int) -> list[str]:
    """The overrides of one configuration, counted from 0. Raises UserError for an index beyond the list."""
    configurations = read_list(path)
    if not 0 <= index < len(configurations):
        raise UserError(
            f"{path} holds {len(configurations)} configurations, so there is no number {index};"
            f" use --array=0-{len(configurations) - 1}"
        )
    return configurations[index]


def check_sweep(path: Path, sweep: Mapping[str, Any]) -> int | None:
    """The number of runs of a W&B sweep file; None if it has no end.

    Raises UserError for a key that W&B or rsotrain does not know, a method that is none, a parameter without
    values and a command that does not hand the parameters on.
    """
    for key in sweep:
        if key not in SWEEP_KEYS:
            raise UserError(f"{path}: a sweep has no key {key}{did_you_mean(str(key), SWEEP_KEYS)}")
    if sweep.get("method") not in METHODS:
        raise UserError(f"{path}: method must be {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    cap = sweep.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise UserError(f"{path}: run_cap must be a number of runs")
    parameters = sweep.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        raise UserError(f"{path} has no parameters to sweep over")
    command = sweep.get("command")
    if not isinstance(command, list) or ARGUMENTS not in command:
        raise UserError(f'{path}: command must be ["${{env}}", rsotrain, "{ARGUMENTS}"]')
    number = 1
    for key, parameter in parameters.items():
        _check_key(path, str(key))
        if not isinstance(parameter, Mapping) or not (
            {"value", "values", "distribution"} & parameter.keys() or {"min", "max"} <= parameter.keys()
        ):
            raise UserError(f"{path}: parameter {key} must have value, values or min and max")
        if "values" in parameter:
            if not isinstance(parameter["values"], list) or not parameter["values"]:
                raise UserError(f"{path}: parameter {key} has no values; list them as values: [a, b]")
            number *= len(parameter["values"])
        _check_text(path, str(key), [parameter.get("value"), *parameter.get("values", ())])
    return min(number, cap or number) if sweep["method"] == "grid" else cap


def _check_text(path: Path, key: str, values: Sequence[object]) -> None:
    """W&B reads the file itself and hands on what YAML makes of it."""
    for value in values if key in keys_of(str) else ():
        if isinstance(value, list):
            _check_text(path, key, value)
        elif value is not None and not isinstance(value, str):
            raise UserError(
                f"{path}: parameter {key} is text, but YAML reads {value!s} as something else;"
                " put what you wrote in quotes"
            )


def _is_sweep(override: str) -> bool:
    """a=1,2 and the like; what Hydra cannot read it says itself when the run starts."""
    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except HydraException:
        return False


def _check_key(path: Path, key: str) -> None:
    known = known_keys()
    if list_of(key) not in known and not key.startswith("hydra"):
        raise UserError(f"{path}: unknown key {key}{did_you_mean(key, known)}")


def _words(line: str) -> list[str]:
    """Words up to a comment, which begins a word: shlex's own would begin in the middle of one.

    Raises ValueError for quotes and backslashes that do not fit.
    """
    words = shlex.shlex(line, posix=True)
    words.whitespace_split, words.commenters = True, ""
    return list(takewhile(lambda word: not word.startswith("#"), words))


def _configuration(place: str, item: object) -> Configuration:
    """From a line, or an item of a YAML list."""
    overrides: list[str] = []
    if isinstance(item, Mapping):
        overrides = [f"{key}={_value(value)}" for key, value in flatten(item)]
    elif isinstance(item, str):
        try:
            overrides = _words(item)
        except ValueError as error:  # a quote that nothing closes, or a backslash at the end
            return Configuration(place, [], f"{error}; check the quotes and backslashes of {item.strip()}")
    fault = None if overrides else "write key: value pairs, or one string of key=value"
    return Configuration(place, overrides, fault)


def _value(value: object) -> str:
    """A YAML value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_value(item) for item in value)}]"
    if isinstance(value, str) and not (_PLAIN.fullmatch(value) and _is_text(value)):
        return quote(value)
    return str(value)


def _is_text(word: str) -> bool:
    """Whether Hydra reads a word without quotes as what it is, not as a number, a truth value or null."""
    return word == "" or isinstance(OverridesParser.create().parse_rule(word, "value"), str)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parse(path: Path, text: str) -> Any:
    """The content of a YAML file; in the mappings of a list, that of text keys as it is written."""

    def restored(node: yaml.Node) -> yaml.Node:
        if isinstance(node, yaml.SequenceNode):
            node.value = [restore_text(item) for item in node.value]
        return node

    try:
        return read_yaml(text, yaml.SafeLoader, restored)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from error
    except (ValueError, RecursionError) as error:  # a date that does not exist, say
        raise UserError(f"{path} cannot be read: {error}") from error


def _shared(faults: Mapping[str, str]) -> dict[str, str]:
    """Each sentence once, with the first place that it is said of: a faulty value is in many runs."""
    places: dict[str, list[str]] = {}
    for place, fault in faults.items():
        places.setdefault(fault, []).append(place)
    others = {fault: len(found) - 1 for fault, found in places.items()}
    return {
        found[0] + (f" (and {others[fault]} more)" if others[fault] else ""): fault
        for fault, found in places.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """0, or 2 for a mistake, said in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m rsotrain.sweep_file", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("index", type=int, nargs="?", help="of a configuration, from 0")
    given = parser.parse_args(arguments)
    try:
        if given.index is not None:
            sys.stdout.write("".join(f"{override}\0" for override in configuration(given.file, given.index)))
            return
        from rsotrain.cli.check_runs import faults_of, members_of_sweep

        content = _parse(given.file, _read(given.file)) if given.file.suffix in (".yaml", ".yml") else None
        if isinstance(content, Mapping):
            number = check_sweep(given.file, content)
            tried = [Configuration(*member) for member in members_of_sweep(content["parameters"])]
        else:
            tried = numbered(given.file)
            number = len(tried)
        faults = {c.place: fault for c in tried if (fault := _fault_of_keys(c))}
        faults |= faults_of([(c.place, c.overrides) for c in tried if c.place not in faults])
        found = {c.place: faults[c.place] for c in tried if c.place in faults}
        for place, fault in (_shared(found) if isinstance(content, Mapping) else found).items():
            print_line(f"{given.file}, {one_line(f'{place}: {fault}')}", sys.stderr)
        if faults:
            raise UserError(f"{given.file}: {len(faults)} of {len(tried)} would be refused")
        runs = "runs without end" if number is None else f"{number} runs"
        whole = ", all of which" if number == len(tried) else f"; {len(tried)} combinations were tried, and"
        print_line(f"{given.file}: {runs}{whole} would start")
    except UserError as error:
        print_line(f"rsotrain: {one_line(str(error))}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
