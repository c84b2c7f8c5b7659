"""The sentence for a value of the wrong kind. OmegaConf has one, too, in the language of Python's types."""

import re
import typing
from enum import Enum
from typing import Any

from rsotrain.config.keys import did_you_mean, field_types, kinds

_REFUSED = re.compile(
    r"Value '(?P<value>.*)' (?:of type|is not a valid)|Invalid value '(?P<word>.*)', expected|"
    r"(?P<null>field '.*' is not Optional)|(?P<list>Invalid value assigned: .* is not a ListConfig)|"
    r"Invalid type assigned: \w+ is not a subclass of \w+\. value: (?P<whole>.*)",
    re.DOTALL,
)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def wrong_value(key: str, said: str) -> str | None:
    """The sentence for what OmegaConf ``said`` of a key's value; None where it is about something else.

    ``key`` may be that of an item of a list, as optimizer.betas[0].
    """
    name = re.sub(r"\[\d+\]$", "", key)
    annotations = field_types().get(name, set())
    found = set().union(*map(kinds, annotations))
    if Any in found:
        return f"{name} must be a list of mappings, as {name}=[{{pattern: …, optimizer: …}}]"
    refused = _REFUSED.match(said)
    if refused is None:
        return None
    value = next((refused[name] for name in ("value", "word", "whole") if refused[name] is not None), "null")
    if refused["whole"] is not None:
        return f"{key}={value} is no value: {key} has keys of its own, which rsotrain --help lists"
    listed = re.search(r"expected one of \[(.*)\]", said)  # those of the chosen option
    words = [word for kind in found if _is_enum(kind) for word in kind.__members__]
    words = listed[1].split(", ") if listed else words
    if words:
        there_are = ", ".join(dict.fromkeys(words))
        return f"{key}={value} does not exist{did_you_mean(value, words)} (there are: {there_are})"
    if not found or not found <= set(_WORDS):
        return None
    wanted = _WORDS[float] if found == {int, float} else " or ".join(sorted(_WORDS[kind] for kind in found))
    if name == key and any(map(_is_list, annotations)):
        return f"{key} must be a list, as {key}=[…], of which each item is {wanted}"
    null = " or null" if all(type(None) in typing.get_args(each) for each in annotations) else ""
    return f"{key}={value} must be {wanted}{null}"


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_list(annotation: Any) -> bool:
    return any(
        typing.get_origin(each) in (list, tuple) for each in (annotation, *typing.get_args(annotation))
    )
