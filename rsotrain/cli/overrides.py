"""What a user types on the command line: spelling mended where the meaning is plain, names looked up."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, RangeSweep
from hydra.errors import HydraException

from rsotrain.cli.text_keys import keep_text
from rsotrain.config.keys import field_types, keys_of
from rsotrain.config.schema import SCHEMAS
from rsotrain.config.text import NAME_BYTES
from rsotrain.errors import UserError, require

_IN_GROUP = re.compile(r"optimizer\.groups\.\d+\.\w")
_ASSIGNMENT = re.compile(r"^(?P<key>\+{0,2}[A-Za-z_][\w./]*)=(?P<value>.*)$", re.DOTALL)
_NO_NAME = re.compile(r"null|true|false|[+-]?(\d[\d_]*\.?\d*(e[+-]?\d+)?|inf|nan)", re.IGNORECASE)
_KEY = re.compile(r"(\+{1,2}|~)?[A-Za-z_][\w$./-]*(@[\w.:]*)?", re.ASCII)
MOST_RUNS = 100_000  # of one command; their list alone takes memory
_INTEGRAL_FLOAT = re.compile(r"^[+-]?\d+(\.0*)?([eE]\+?\d+)?$")


def chosen_options(arguments: Sequence[str]) -> dict[str, str]:
    """Group -> what ``arguments`` choose from it; of a sweep, all of it."""
    matches = [match for argument in arguments if (match := _ASSIGNMENT.match(argument))]
    chosen = {match["key"].lstrip("+"): match["value"] for match in matches}
    groups = {*SCHEMAS, "experiment", "tuned"}
    return {key: value for key, value in chosen.items() if key in groups or key.startswith("hydra/")}


def key_of(argument: str) -> str:
    """The key or group that an override is for."""
    return argument.partition("=")[0].lstrip("+~").partition("@")[0]


def check_overrides(arguments: Sequence[str]) -> None:
    """Raise UserError for what Hydra takes without a word, or has a traceback only for.

    Such are an empty key, a group that is given null or a number, an empty mapping, a number of thousands of
    digits or for a truth value, and a sweep over billions of runs, of which Hydra would make a list.
    """
    runs, leaves = 1, field_types()
    for argument in arguments:
        key, _, value = argument.partition("=")
        require(bool(_KEY.fullmatch(key)), f"{argument!r} is not of the form key=value")
        require(value != "{}", f"{argument} sets nothing; leave it out")
        name = key.lstrip("+~")
        require(len(name) <= NAME_BYTES, f"unknown key {name}")  # Hydra looks for a file of that name
        require(
            name != "hydra", f"{argument} is for none of Hydra's settings; name one, as hydra.verbose=true"
        )
        whole = next((leaf for leaf in leaves if name.startswith(f"{leaf}.")), None)
        if whole is not None and not _is_item(whole, name.removeprefix(f"{whole}.")):
            raise UserError(f"unknown key {name}; {whole} has no parts of a name")
        number = re.search(r"[\d_]{400}", value)  # beyond any float, and soon beyond what Python reads
        require(number is None or name in keys_of(str), f"{name}={value} is larger than any number may be")
        if name in keys_of(bool):
            for word in value.split(","):
                require(not _is_other_number(word), f"{name}={word} must be true or false")
        runs *= _count(argument)
        require(
            runs <= MOST_RUNS, f"{argument} makes this a sweep over more than {MOST_RUNS:_} runs; give fewer"
        )
    _check_choices(arguments)


def _is_item(key: str, rest: str) -> bool:
    """Is ``rest`` a part of a list: 0 of optimizer.betas, or 0.lr of optimizer.groups?"""
    number, point, _ = rest.partition(".")
    return number.isdecimal() and (not point or key == "optimizer.groups")


def _is_other_number(word: str) -> bool:
    """Whether a word is an integer, but neither 0 nor 1: Hydra would read it as true."""
    return bool(re.fullmatch(r"[+-]?\d+(_\d+)*", word)) and int(word) not in (0, 1)


def _count(argument: str) -> int:
    """How many values an override sweeps over; 1 for what Hydra cannot read and will say so."""
    if not re.search(r"[,(]", argument):
        return 1
    try:
        swept = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return 1
    if isinstance(swept, ChoiceSweep):
        return len(swept.list)
    if isinstance(swept, RangeSweep) and swept.start is not None and swept.stop is not None and swept.step:
        return max(1, int((swept.stop - swept.start) / swept.step))
    return 1


def _check_choices(arguments: Sequence[str]) -> None:
    for group, value in chosen_options(arguments).items():
        if group == "tuned" and value.startswith("["):
            raise UserError(f"tuned={value}: a run has one method's rates; name one, or sweep with tuned=a,b")
        for word in re.split(r"[,()\[\]\s]+", value):
            if _NO_NAME.fullmatch(word):
                if group.startswith("hydra/"):
                    raise UserError(f"{group}={word} chooses no option; leave it out")
                advice = {
                    "experiment": "leave it out",
                    "tuned": "leave it out, or write ~tuned where an experiment chooses one",
                }.get(group, "leave it out or name one that rsotrain --help lists")
                raise UserError(f"{group}={word} chooses no option; {advice}")


def check_tuned(tuned: str, method: str, optimizer: str, arguments: Sequence[str]) -> None:
    """Raise UserError where the optimizer is not the ``method`` that the rates of conf/tuned are for."""
    if method != optimizer:
        chosen = chosen_options(arguments)
        advice = f"say tuned={optimizer}"
        if "optimizer" in chosen:
            advice += f" instead of optimizer={chosen['optimizer']}"
        elif "tuned" in chosen:
            advice = f"leave tuned={tuned} out"
        raise UserError(
            f"conf/tuned/{tuned}.yaml has {method}'s rates, but the optimizer is {optimizer}; {advice}"
        )


def check_length(epochs: float | None, arguments: Sequence[str]) -> None:
    """Raise UserError where both ``steps`` and ``epochs`` are given; a default of steps gives way."""
    steps = next((argument for argument in arguments if argument.lstrip("+").startswith("steps=")), None)
    require(
        epochs is None or steps is None,
        f"{steps} and epochs={epochs} both say how long the run is; give one of them",
    )


def _normalise_value(value: str, integer: bool) -> str:
    if value == "None":
        return "null"
    if integer and _INTEGRAL_FLOAT.match(value) and abs(float(value)) < 2**53:
        return str(int(float(value)))
    return value


def normalise(arguments: Sequence[str]) -> list[str]:
    """Values in the form Hydra takes: text quoted, what other programs write (W&B: ``None``) mended."""
    out = []
    for argument in arguments:
        if _IN_GROUP.match(argument):  # which a group need not have yet
            argument = f"++{argument}"
        match = _ASSIGNMENT.match(argument)
        if match and not re.search(r"[\[\]{}()'\"]", match["value"]):
            integer = match["key"].lstrip("+") in keys_of(int)
            values = [_normalise_value(v, integer) for v in match["value"].split(",")]
            argument = f"{match['key']}={','.join(values)}"
        out.append(keep_text(argument))
    return out
