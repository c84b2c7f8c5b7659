"""Every number of the configuration has a range, and one sentence for what lies outside of it."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from rsotrain.config.data import TrainedTokenizerConfig
from rsotrain.config.keys import kinds
from rsotrain.config.methods import AdamConfig, MuonConfig, OptimizerConfig
from rsotrain.config.ranges import Range, check_ranges, number, numbers, range_of
from rsotrain.config.samplers import RandomizedSvdConfig
from rsotrain.config.schema import SCHEMAS, Config, ModelConfig
from rsotrain.errors import UserError


def all_schemas() -> Iterator[tuple[str, type]]:
    """(prefix of its keys, schema): the run's own, those of each group, those without a choice."""
    yield "", Config
    for group, schemas in SCHEMAS.items():
        yield from ((f"{group}.", schema) for schema in schemas.values())
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type) and field.name not in SCHEMAS:
            assert isinstance(field.type, type)
            yield f"{field.name}.", field.type


def numeric_fields() -> list[tuple[str, type, "dataclasses.Field[Any]"]]:
    return [
        (prefix, schema, field)
        for prefix, schema in all_schemas()
        for field in dataclasses.fields(schema)
        if kinds(field.type) & {int, float}
    ]


def test_every_number_of_every_schema_has_a_range() -> None:
    missing = {
        f"{schema.__name__}.{field.name}" for _, schema, field in numeric_fields() if range_of(field) is None
    }
    assert not missing, f"declare a range with number(…) of rsotrain/config/ranges.py for {sorted(missing)}"
    assert len(numeric_fields()) > 150  # the walk has found them


def test_only_numbers_have_ranges() -> None:
    for _, schema in all_schemas():
        for field in dataclasses.fields(schema):
            if range_of(field) is not None:
                assert kinds(field.type) <= {int, float}, f"{schema.__name__}.{field.name}"


def test_every_default_lies_in_its_range() -> None:
    for _, schema, field in numeric_fields():
        allowed, default = range_of(field), field.default
        if isinstance(default, int | float):
            assert isinstance(allowed, Range)
            assert default in allowed, f"{schema.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("prefix", "schema", "name"),
    sorted({(prefix, schema, field.name) for prefix, schema, field in numeric_fields()}, key=str),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_lies_beyond_either_end_is_refused_by_name(prefix: str, schema: type, name: str) -> None:
    """Sizes of 10³⁰, negative numbers, NaN and infinities, as elements of a list, too."""
    config = schema()
    (field,) = (field for field in dataclasses.fields(schema) if field.name == name)
    for other in dataclasses.fields(schema):
        if isinstance(range_of(other), Range) and other.name != name:
            setattr(config, other.name, None)  # its turn comes
    several = isinstance(range_of(field), tuple)
    for value in (10**30, -(10**30), float("nan"), float("inf"), -float("inf"), 10**400):
        setattr(config, name, [value, value] if several else value)
        with pytest.raises(UserError, match=re.escape(f"{prefix}{name}=")):
            check_ranges(config, prefix)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ModelConfig(hidden_size=0), "hidden_size=0 must be positive"),
        (ModelConfig(hidden_size=10**6 + 1), "hidden_size=1000001 must be at most 1_000_000"),
        (AdamConfig(lr=-1.0), "lr=-1.0 must not be negative"),
        (AdamConfig(lr=0.1, betas=(0.9, 1.5)), "the second in [0, 1]"),
        (AdamConfig(lr=0.1, betas=(1.0, 0.9)), "must be two numbers, the first in [0, 1), the second in"),
        (AdamConfig(lr=0.1, betas=(0.9,)), "betas=[0.9] must be two numbers"),  # type: ignore[arg-type]
        (AdamConfig(lr=0.1, betas=([1], [2])), "betas=[[1], [2]] must be two numbers"),  # type: ignore[arg-type]
        (MuonConfig(lr=0.1, ns_steps=0), "ns_steps=0 must be at least 1"),
        (RandomizedSvdConfig(rounds=10**9), "rounds=1000000000 must be at most 100"),
        (TrainedTokenizerConfig(character_coverage=0.95), "character_coverage=0.95 must lie in [0.98, 1]"),
        (TrainedTokenizerConfig(vocab_size=259), "vocab_size=259 must be at least 260"),
    ],
)
def test_the_sentence_says_which_end_is_passed(config: object, sentence: str) -> None:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if getattr(config, field.name) == "???":
            setattr(config, field.name, None)
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_ranges(config)


def test_both_ends_belong_to_a_range_or_do_not() -> None:
    for allowed, inside, outside, text in (
        (Range(at_least=0, at_most=1), (0, 0.5, 1), (-1e-9, 1.0001), "[0, 1]"),
        (Range(above=0, below=1), (1e-9, 0.5), (0, 1), "(0, 1)"),
        (Range(above=0, at_most=10**6), (1, 10**6), (0, 10**6 + 1), "(0, 1_000_000]"),
    ):
        assert all(value in allowed for value in inside)
        assert not any(value in allowed for value in (*outside, float("nan")))
        assert str(allowed) == text


def test_a_range_needs_both_ends() -> None:
    for ends in ({}, {"above": 0}, {"at_most": 1}, {"above": 0, "at_least": 0, "at_most": 1}):
        with pytest.raises(AssertionError, match="a range has one"):
            number(1, **ends)
    with pytest.raises(AssertionError):
        numbers((1, 2), Range(above=0, below=3))


def test_numbers_in_dataclasses_of_dataclasses_are_found() -> None:
    config = Config(steps=1, batch_size=1, seq_len=8, optimizer=OptimizerConfig(lr=0.1))
    config.model = ModelConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=-5
    )
    with pytest.raises(UserError, match=r"^model\.vocab_size=-5 must be positive$"):
        check_ranges(config)
