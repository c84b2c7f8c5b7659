"""Bad inputs for every key of the configuration, made from its schemas."""

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from rsotrain.config.defaults import conf_dir
from rsotrain.config.keys import kinds
from rsotrain.config.ranges import Range, range_of
from rsotrain.config.schema import SCHEMAS, Config
from rsotrain.config.text import is_path

# What an option lacks, in a folder that holds rows.jsonl.
NEEDED = {
    "files": ["data.path=rows.jsonl", "data.validation_fraction=0.1"],
    "instructions": ["data.path=rows.jsonl", "data.validation_fraction=0.1"],
    "hub": ["data.name=somebody/something"],
    "sentencepiece": ["tokenizer.path=rows.jsonl"],
    "huggingface": ["tokenizer.path=."],
}
HUGE, LONG = "1" + "0" * 30, "l" * 300
NO_SCALAR = ["[a,b]", "{a: 1}", "'", "${nope}", "a b='", "{}"]
NO_NUMBER = [
    *NO_SCALAR, "abc", "", HUGE, f"-{HUGE}", "1e30", "-1e30", "nan", "inf", "-inf", "1e999", "true", "é",
    "../x", "'1 2'", "9" * 5000, "0x10", "1;2", "'\n'",
]  # fmt: skip
NO_NUMBERS = [
    "0.9", "[]", "[0.9]", "[0.9,0.9,0.9]", "[a,b]", "[nan,0.9]", "[2,2]", f"[{HUGE},0.9]", "[0.9,null]",
    "[[1],[2]]", "{a: 1}", "'[0.9,0.9]'",
]  # fmt: skip
NO_TRUTH = [*NO_SCALAR, "maybe", "2", "-1", "1.5", "é", "", "nan"]
NO_MEMBER = [*NO_SCALAR, "nope", "", "é", "1", "true", "../x"]
NO_TEXT = [*NO_SCALAR, "'a\0b'", "\udcff"]
NO_PATH = [*NO_TEXT, "", "' '", LONG, f"{LONG}/x", "x/" * 2000, "~nobodyhere/x"]
NO_NAME = [*NO_TEXT, "", ".", "..", "../x", "/x", "a/b", LONG, "é" * 200, "a\nb", "\x1b[2J"]
NO_TEXTS = ["x", "{a: 1}", "[[a]]", "[{a: 1}]", "[null]", "[a", "['\0']"]
ODD_TEXT = ["10_000", "1e5", "2026-11-26", "true", "é", "a b", "🐋", "-", "C:\\x", "<b>&amp;", "$x"]
GROUPS = (*SCHEMAS, "experiment", "tuned", "hydra/launcher")
NO_OPTION = ["nope", "", "null", "1", "true", "é", "../x", "a b", LONG, "{}", "[nope]", "${nope}", "'"]
NAMES = ("run_name", "model.name", "optimizer.name", "sampler.name")  # of a run's folder, or parts of it


@dataclass(frozen=True)
class Case:
    """``starts``: False where nothing may start, None where other rules than those of the key decide.

    ``value``: what stands in the configuration that starts.
    """

    options: tuple[str, ...]
    key: str
    typed: str
    starts: bool | None = False
    value: Any = None

    @property
    def command(self) -> list[str]:
        return [*self.options, f"{self.key}={self.typed}"]


@cache
def option_of(group: str, schema: str) -> str:
    """A file of conf/<group>/ that is made on this schema."""
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        if re.search(rf"/schema/{group}/{schema}@", file.read_text()):
            return file.stem
    raise AssertionError(f"no file of conf/{group} has the schema {schema}")


def every_field() -> Iterator[tuple[tuple[str, ...], str, "dataclasses.Field[Any]"]]:
    """(options that have the key, key, its field) of every key, once."""
    seen: set[str] = set()
    for top in dataclasses.fields(Config):
        for schema, kind in dict(SCHEMAS.get(top.name, {"": top.type})).items():
            option = option_of(top.name, schema) if schema else ""
            options = (f"{top.name}={option}", *NEEDED.get(option, ())) if schema else ()
            for key, field in _leaves(top, kind, ""):
                if key not in seen:
                    seen.add(key)
                    yield options, key, field


def _leaves(field: Any, kind: Any, prefix: str) -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    if not dataclasses.is_dataclass(kind):
        yield f"{prefix}{field.name}", field
        return
    for inner in dataclasses.fields(kind):
        yield from _leaves(inner, inner.type, f"{prefix}{field.name}.")


def _numbers(allowed: Range, whole: bool) -> Iterator[tuple[str, bool | None, Any]]:
    for value in (0, -1, 0.5, 1, 10**12 + 1):
        fits = value in allowed and not (whole and isinstance(value, float))
        yield str(value), None if fits else False, value


def _values(key: str, field: "dataclasses.Field[Any]") -> Iterator[tuple[str, bool | None, Any]]:
    """(as typed, whether it starts, what it is then)."""
    of, allowed = kinds(field.type), range_of(field)
    if isinstance(allowed, Range):
        yield from _numbers(allowed, whole=of == {int})
        bad = NO_NUMBER
    elif allowed is not None:
        bad = NO_NUMBERS
    elif of == {bool}:
        yield "true", None, True
        bad = NO_TRUTH
    elif all(issubclass(kind, Enum) for kind in of):
        bad = NO_MEMBER
    elif "list[" in str(field.type):
        yield "[10_000,true]", None, ["10_000", "true"]
        bad = NO_TEXTS
    else:
        yield from ((text, None, text) for text in ODD_TEXT)
        bad = NO_NAME if key in NAMES else NO_PATH if is_path(field) else NO_TEXT
    yield "null", None if "None" in str(field.type) else False, None
    yield from ((text, False, None) for text in bad)


def bad_inputs(per_key: int) -> list[Case]:
    """At most ``per_key`` for each key and group, drawn alike every time."""
    draw = random.Random(0)
    cases = []
    for options, key, field in every_field():
        of_key = [Case(options, key, *value) for value in _values(key, field)]
        of_key += [Case(options, f"{key}x", "1"), Case(options, f"{key}.x", "1"), Case(options, key, "1,2")]
        cases += draw.sample(of_key, min(per_key, len(of_key)))
    for group in GROUPS:
        cases += [Case((), group, typed) for typed in draw.sample(NO_OPTION, min(per_key, len(NO_OPTION)))]
    return cases
