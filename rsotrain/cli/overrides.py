"""What a user types on the command line: spelling mended where the meaning is plain, names looked up."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rsotrain.config.schema import SCHEMAS, Config
from rsotrain.errors import UserError

_ASSIGNMENT = re.compile(r"^(?P<key>\+{0,2}[A-Za-z_][\w.]*)=(?P<value>.*)$", re.DOTALL)
_NO_NAME = re.compile(r"null|true|false|[+-]?(\d[\d_]*\.?\d*(e[+-]?\d+)?|inf|nan)", re.IGNORECASE)
_INTEGRAL_FLOAT = re.compile(r"^[+-]?\d+(\.0*)?([eE]\+?\d+)?$")


def _field_types() -> dict[str, set[Any]]:
    """Dotted key -> the types that any schema gives it."""
    found: dict[str, set[Any]] = {}
    for f in dataclasses.fields(Config):
        if f.name in SCHEMAS:
            for schema in SCHEMAS[f.name].values():
                for g in dataclasses.fields(schema):
                    found.setdefault(f"{f.name}.{g.name}", set()).add(g.type)
        elif dataclasses.is_dataclass(f.type):
            for g in dataclasses.fields(f.type):
                found.setdefault(f"{f.name}.{g.name}", set()).add(g.type)
        else:
            found.setdefault(f.name, set()).add(f.type)
    return found


def known_keys() -> list[str]:
    """Every key and group that a command line can set."""
    return sorted(set(_field_types()) | set(SCHEMAS) | {"experiment", "tuned"})


def _chosen(arguments: Sequence[str]) -> dict[str, str]:
    """Group -> what ``arguments`` choose from it; of a sweep, all of it."""
    matches = [match for argument in arguments if (match := _ASSIGNMENT.match(argument))]
    groups = {*SCHEMAS, "experiment", "tuned"}
    return {group: m["value"] for m in matches if (group := m["key"].lstrip("+")) in groups}


def check_choices(arguments: Sequence[str]) -> None:
    """Raise UserError where a group is given null or a number, for which Hydra has a traceback only."""
    for group, value in _chosen(arguments).items():
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
        chosen = _chosen(arguments)
        advice = f"say tuned={optimizer}"
        if "optimizer" in chosen:
            advice += f" instead of optimizer={chosen['optimizer']}"
        elif "tuned" in chosen:
            advice = f"leave tuned={tuned} out"
        raise UserError(
            f"conf/tuned/{tuned}.yaml has {tuned}'s rates, but the optimizer is {optimizer}; {advice}"
        )


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
    chosen = {group: value for group, value in _chosen(arguments).items() if "," not in value}
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


def _takes_integers_only(key: str) -> bool:
    def plain(annotation: Any) -> set[Any]:
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            return set(typing.get_args(annotation)) - {type(None)}
        return {annotation}

    annotations = _field_types().get(key, set())
    return bool(annotations) and all(plain(a) == {int} for a in annotations)


def _normalise_value(value: str, integer: bool) -> str:
    if value == "None":
        return "null"
    if integer and _INTEGRAL_FLOAT.match(value) and abs(float(value)) < 2**53:
        return str(int(float(value)))
    return value


def normalise(arguments: Sequence[str]) -> list[str]:
    """Values as other programs write them (W&B: ``None``, ``1000000000.0``) in the form Hydra takes."""
    out = []
    for argument in arguments:
        match = _ASSIGNMENT.match(argument)
        if match and not re.search(r"[\[\]{}()'\"]", match["value"]):
            integer = _takes_integers_only(match["key"].lstrip("+"))
            values = [_normalise_value(v, integer) for v in match["value"].split(",")]
            argument = f"{match['key']}={','.join(values)}"
        out.append(argument)
    return out


def did_you_mean(name: str, candidates: Sequence[str]) -> str:
    """ "; did you mean a, b?" with the nearest names, or the empty string."""
    candidates = [c for c in candidates if c != name]
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if not near:  # the last part alone: optimizer.learning_rate, or lr for optimizer.lr
        last = {c: c.rsplit(".", 1)[-1] for c in candidates}
        near_last = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last.values()))
        near = [c for c in candidates if last[c] in near_last]
    return f"; did you mean {', '.join(near[:3])}?" if near else ""


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mapping -> (dotted key, leaf) pairs in order."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
