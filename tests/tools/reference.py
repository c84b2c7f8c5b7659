"""Write conf/README.md, the reference of all groups and keys: python tests/tools/reference.py

Meanings, units, types, ranges and defaults are those of the schemas' fields; what an option sets is what its
file of conf/ says. A test checks that the page is current.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import MISSING

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rsotrain.cli.help import by_size, choices  # noqa: E402
from rsotrain.config.keys import flatten, kinds, plain  # noqa: E402
from rsotrain.config.meanings import meaning_of, unit_of  # noqa: E402
from rsotrain.config.ranges import Range, range_of  # noqa: E402
from rsotrain.config.schema import SCHEMAS, Config  # noqa: E402

CONF = ROOT / "conf"
PAGE = CONF / "README.md"
HEAD = """\
# Configuration: every group and key

Each folder here is a group, and each file in it an option of the group: `optimizer=galore` is
`optimizer/galore.yaml`. `config.yaml` is the default job. `rsotrain --help` shows the keys of the chosen
options with their values, and `rsotrain optimizer=galore --help` those of that option. This page is written
by `python tests/tools/reference.py`.

A range such as (0, 1] leaves out 0 and includes 1. A default in *italics* is that of the default job, or is
given by the option; *required* means that you give the value. `null` is no value.

"""
ELSEWHERE = {
    "experiment": "The papers' recipes, which set many keys at once: [their page](experiment/README.md).",
    "tuned": "A method with the rates that suit the default job's model:"
    " [how they were found](../outputs/study/rates.md).",
}
MORE = {
    "optimizer": "What each method does: [methods](../rsotrain/optim/README.md).",
    "sampler": "The way in which the subspace is found; an optimizer selects its own.",
    "data": "How text becomes sequences: [data](../rsotrain/data/README.md).",
    "parallelism": "[Several processes](../rsotrain/parallel/README.md).",
    "model": "Sizes are those of the papers' tables; `model=pretrained` is a Hugging Face folder's.",
    "evaluation": "[Trained models](../rsotrain/inference/README.md).",
    "report": "[Reports](../sweeps/README.md#reports).",
    "tune": "[Tuning](../sweeps/README.md#tuning).",
}


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", "\\n")


def code(value: object) -> str:
    return f"`{cell(value)}`"


def type_of(annotation: Any) -> str:
    """In the reader's words: number, integer, text, true or false, one of some words."""
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    parts = [part for part in get_args(annotation) or (annotation,) if part is not type(None)]
    null = " or null" if type(None) in get_args(annotation) else ""
    origin = getattr(annotation, "__origin__", None)
    if origin in (list, tuple):
        inner = "mapping" if Any in kinds(annotation) else names[next(iter(kinds(annotation)))]
        return f"list of {inner}" if origin is list else f"{len(parts)} numbers"
    words = []
    for part in parts:
        if get_args(part):
            words.append(f"list of {names[next(iter(kinds(part)))]}")
        else:
            words.append(", ".join(map(code, choices(part))) if choices(part) else names[part])
    return " or ".join(words) + null


def range_text(field: "dataclasses.Field[Any]") -> str:
    found = range_of(field)
    return ", ".join(str(r) for r in ([found] if isinstance(found, Range) else found or ()))


def default_of(field: "dataclasses.Field[Any]", given: dict[str, Any], set_by_options: bool) -> str:
    """``given``: what the default job sets."""
    if field.name in given:
        return f"*{code(given[field.name])}*"
    value = field.default_factory() if callable(field.default_factory) else field.default
    if value == MISSING:
        return "*by option*" if set_by_options else "*required*"
    value = plain(value)
    if value is None or isinstance(value, bool):
        return code(str(value).lower() if value is not None else "null")
    return code(value)


def meaning(field: "dataclasses.Field[Any]") -> str:
    """With what the words of an enumeration mean, where its docstring says so."""
    text = meaning_of(field)
    for kind in kinds(field.type):
        own = isinstance(kind, type) and issubclass(kind, Enum) and kind.__doc__
        if own and re.search(r"^\w+: |\. \w+: ", kind.__doc__ or ""):
            text += f". {' '.join((kind.__doc__ or '').split()).replace('``', '`')}"
    return cell(text.removesuffix("."))


def rows(
    schema: type, prefix: str, only: Sequence[str] | None, given: dict[str, Any], settable: set[str]
) -> Iterator[str]:
    for field in dataclasses.fields(schema):
        if only is not None and field.name not in only:
            continue
        if dataclasses.is_dataclass(field.type):
            if only is None:
                yield from rows(field.type, f"{prefix}{field.name}.", None, {}, set())  # type: ignore[arg-type]
            continue
        cells = [
            code(f"{prefix}{field.name}"), meaning(field), type_of(field.type), unit_of(field) or "",
            range_text(field), default_of(field, given, field.name in settable),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def table(body: Sequence[str]) -> list[str]:
    return ["| key | meaning | type | unit | range | default |", "|---|---|---|---|---|---|", *body, ""]


def sentence(schema: type) -> str:
    """The docstring's first paragraph."""
    return " ".join((schema.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


# --- options -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """A file of a group: its schema, what it is in a sentence, and dotted key -> value of what it sets."""

    name: str
    schema: str
    what: str
    sets: dict[str, Any]


def option(group: str, file: Path) -> Option:
    text = file.read_text()
    content = yaml.safe_load(text) or {}
    schema, sets = "", {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):
            sets |= {re.sub(r"^override /", "", key): value for key, value in entry.items()}
        elif "/schema/" in entry:
            schema = re.sub(r"@.*", "", entry).rpartition("/")[2]
        elif entry != "_self_":  # another option of the group, which this one builds on
            base = option(group, file.with_name(f"{entry}.yaml"))
            schema, sets = base.schema, base.sets | sets
    is_global = "@package _global_" in text
    sets |= {key if is_global else f"{group}.{key}": value for key, value in flatten(content)}
    described = SCHEMAS[group].get(schema) if len(SCHEMAS[group]) > 1 else None
    what = first_comment(text) or (sentence(described) if described else "")
    sets = {key: value for key, value in sets.items() if key != f"{group}.name"}
    return Option(file.stem, schema, what, sets)


def first_comment(text: str) -> str:
    """The first sentence of the comment at the head of a file."""
    lines = re.match(r"(?:# @package.*\n)?((?:#.*\n)*)", text)
    words = " ".join(line.lstrip("# ") for line in (lines[1] if lines else "").splitlines())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", words)[0]


def options(group: str) -> list[Option]:
    return [
        option(group, file) for file in sorted((CONF / group).glob("*.yaml"), key=lambda f: by_size(f.stem))
    ]


def setting(key: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        return code(f"{key}={'null' if value is None else str(value).lower()}")
    return code(f"{key}={value}")


def option_row(group: str, one: Option) -> str:
    cells = [
        code(f"{group}={one.name}"),
        cell(one.what),
        " ".join(setting(*pair) for pair in one.sets.items()),
    ]
    return f"| {' | '.join(cells)} |"


def group_part(group: str, base: type) -> Iterator[str]:
    found = options(group)
    settable = {key.removeprefix(f"{group}.") for one in found for key in one.sets}
    yield f"## {group}\n"
    if group in MORE:
        yield f"{MORE[group]}\n"
    lines = [option_row(group, one) for one in found]
    yield from ["| option | what it is | what it sets |", "|---|---|---|", *lines, ""]
    common = [field.name for field in dataclasses.fields(base)]
    heading = "Keys of every option:" if len(SCHEMAS[group]) > 1 else "Keys:"
    yield from [f"{heading}\n", *table(list(rows(base, f"{group}.", None, {}, settable)))]
    for names, body in own_keys(group, common, found):
        yield from [f"Keys of {names}:\n", *table(body)]


def own_keys(group: str, common: Sequence[str], found: Sequence[Option]) -> Iterator[tuple[str, list[str]]]:
    """(options, rows) of the keys that only some options have; options with the same rows share them."""
    of: dict[str, list[str]] = {}
    for one in found:
        schema = SCHEMAS[group].get(one.schema)
        if schema is None:
            continue
        extra = [f.name for f in dataclasses.fields(schema) if f.name not in common]
        for row in rows(schema, f"{group}.", extra, {}, {k.removeprefix(f"{group}.") for k in one.sets}):
            of.setdefault(row, []).append(one.name)
    shared: dict[tuple[str, ...], list[str]] = {}
    for row, names in of.items():
        shared.setdefault(tuple(names), []).append(row)
    for owners, body in shared.items():
        yield ", ".join(code(f"{group}={name}") for name in owners), body


def page() -> str:
    job = yaml.safe_load((CONF / "config.yaml").read_text())
    lines = ["## The run\n", *table(list(rows(Config, "", _plain_fields(), job, set())))]
    for field in dataclasses.fields(Config):
        if field.name in SCHEMAS:
            lines += group_part(field.name, field.type)  # type: ignore[arg-type]
        elif dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            lines += [
                f"## {field.name}\n",
                f"{sentence(field.type)} {MORE.get(field.name, '')}".rstrip() + "\n",
            ]
            lines += table(list(rows(field.type, f"{field.name}.", None, {}, set())))
    for group, text in ELSEWHERE.items():
        files = sorted((CONF / group).glob("*.yaml"), key=lambda file: by_size(file.stem))
        lines += [f"## {group}\n", f"{text}\n", f"{', '.join(code(file.stem) for file in files)}\n"]
    return HEAD + "\n".join(lines).rstrip() + "\n"


def _plain_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Config) if not dataclasses.is_dataclass(field.type)]


if __name__ == "__main__":
    PAGE.write_text(page())
