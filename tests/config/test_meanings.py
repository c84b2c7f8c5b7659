"""Every key says what it means, and ``--help`` and conf/README.md say the same."""

import dataclasses
import re
import sys

import pytest
from helpers.command import ROOT, Cli

from rsotrain.config.keys import field_types, kinds
from rsotrain.config.later import later, later_of
from rsotrain.config.meanings import meaning_of, means, unit_of
from rsotrain.config.ranges import number, range_of
from rsotrain.config.schema import SCHEMAS, Config

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import reference


def fields_of(schema: type) -> list["dataclasses.Field[object]"]:
    """Those that hold a value, in the dataclasses inside of it, too."""
    found = []
    for field in dataclasses.fields(schema):
        inner = field.type
        found += fields_of(inner) if isinstance(inner, type) and dataclasses.is_dataclass(inner) else [field]
    return found


ALL = {schema for schemas in SCHEMAS.values() for schema in schemas.values()} | {Config}
FIELDS = [(schema, field) for schema in sorted(ALL, key=lambda s: s.__name__) for field in fields_of(schema)]


@pytest.mark.parametrize("schema", sorted(ALL, key=lambda s: s.__name__))
def test_every_key_has_a_meaning_of_one_line(schema: type) -> None:
    for field in fields_of(schema):
        meaning = meaning_of(field)
        assert meaning, (
            f"{schema.__name__}.{field.name} lacks its meaning: means('…', …) of config/meanings.py"
        )
        assert len(meaning) <= 110
        assert not meaning.endswith(".")
        assert "\n" not in meaning


def test_what_is_null_by_default_says_what_that_means() -> None:
    silent = {
        f"{schema.__name__}.{field.name}"
        for schema, field in FIELDS
        if field.default is None and "null" not in meaning_of(field)
    }
    assert (
        silent
        - {  # of other dataclasses' fields: rotary scaling, by its type
            f"{schema.__name__}.{name}"
            for schema in ALL
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        }
        == set()
    )


def test_a_meaning_stands_beside_range_and_age() -> None:
    field = dataclasses.fields(
        dataclasses.make_dataclass(
            "C", [("x", int, means("m", later(number(3, above=0, at_most=9)), unit="u"))]
        )
    )[0]
    assert (meaning_of(field), unit_of(field), field.default) == ("m", "u", 3)
    assert later_of(field) is not None
    assert str(range_of(field)) == "(0, 9]"


def test_the_reference_is_current() -> None:
    assert reference.PAGE.read_text() == reference.page(), "python tests/tools/reference.py"


def test_the_reference_has_every_key_and_every_option() -> None:
    page = reference.PAGE.read_text()
    keys = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    assert keys == set(field_types())
    for group in SCHEMAS:
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"| `{group}={file.stem}` |" in page


def test_help_says_what_the_keys_of_the_chosen_options_mean(cli: Cli) -> None:
    words = cli("optimizer=frugal", "data=files", "lr_scheduler=wsd", "--help").stdout
    shown = " ".join(words.split())
    config = {"optimizer": "frugal", "data": "files", "lr_scheduler": "wsd"}
    for group, schema in config.items():
        for field in fields_of(SCHEMAS[group][schema]):
            assert f"{group}.{field.name}=" in shown
            assert meaning_of(field) in shown
    assert "optimizer.free_scale=1.0" in shown
    assert "data.path=???" in shown
    assert "optimizer.max_growth" not in shown  # of another optimizer
    assert max(map(len, words.splitlines())) <= 120
    for kind in kinds(Config.__dataclass_fields__["precision"].type):
        assert f"({', '.join(kind.__members__)})" in shown
