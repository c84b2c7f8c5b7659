"""What a user types on the command line: spelling mended where the meaning is plain, names looked up."""

import re
from collections.abc import Sequence

from rsotrain.cli.text_keys import keep_text
from rsotrain.config.keys import field_types, kinds
from rsotrain.config.schema import SCHEMAS
from rsotrain.errors import UserError

_ASSIGNMENT = re.compile(r"^(?P<key>\+{0,2}[A-Za-z_][\w.]*)=(?P<value>.*)$", re.DOTALL)
_NO_NAME = re.compile(r"null|true|false|[+-]?(\d[\d_]*\.?\d*(e[+-]?\d+)?|inf|nan)", re.IGNORECASE)
_INTEGRAL_FLOAT = re.compile(r"^[+-]?\d+(\.0*)?([eE]\+?\d+)?$")


def chosen_options(arguments: Sequence[str]) -> dict[str, str]:
    """Group -> what ``arguments`` choose from it; of a sweep, all of it."""
    matches = [match for argument in arguments if (match := _ASSIGNMENT.match(argument))]
    groups = {*SCHEMAS, "experiment", "tuned"}
    return {group: m["value"] for m in matches if (group := m["key"].lstrip("+")) in groups}


def check_choices(arguments: Sequence[str]) -> None:
    """Raise UserError where a group is given null or a number, for which Hydra has a traceback only."""
    for group, value in chosen_options(arguments).items():
        if group == "tuned" and value.startswith("["):
            raise UserError(f"tuned={value}: a run has one method's rates; name one, or sweep with tuned=a,b")
        for word in re.split(r"[,()\[\]\s]+", value):
            if _NO_NAME.fullmatch(word):
                advice = {
                    "experiment": "leave it out",
                    "tuned": "leave it out, or write ~tuned where an experiment chooses one",
                }.get(group, "leave it out or name one that rsotrain --help lists")
                raise UserError(f"{group}={word} chooses no option; {advice}")


def check_tuned(tuned: str, optimizer: str, arguments: Sequence[str]) -> None:
    """Raise UserError where the optimizer is not the one that the rates of conf/tuned are for."""
    if tuned != optimizer:
        chosen = chosen_options(arguments)
        advice = f"say tuned={optimizer}"
        if "optimizer" in chosen:
            advice += f" instead of optimizer={chosen['optimizer']}"
        elif "tuned" in chosen:
            advice = f"leave tuned={tuned} out"
        raise UserError(
            f"conf/tuned/{tuned}.yaml has {tuned}'s rates, but the optimizer is {optimizer}; {advice}"
        )


def _takes_integers_only(key: str) -> bool:
    annotations = field_types().get(key, set())
    return bool(annotations) and all(kinds(annotation) == {int} for annotation in annotations)


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
        match = _ASSIGNMENT.match(argument)
        if match and not re.search(r"[\[\]{}()'\"]", match["value"]):
            integer = _takes_integers_only(match["key"].lstrip("+"))
            values = [_normalise_value(v, integer) for v in match["value"].split(",")]
            argument = f"{match['key']}={','.join(values)}"
        out.append(keep_text(argument))
    return out
