"""Which text of the configuration names files, and what lists of it may hold."""

import dataclasses
from typing import Any

import pytest

from rsotrain.config.data import GenerateConfig
from rsotrain.config.keys import kinds
from rsotrain.config.schema import SCHEMAS, Config
from rsotrain.config.text import check_text, is_path
from rsotrain.errors import UserError


def test_every_path_is_declared_as_one() -> None:
    """By their names; a path that is not declared is not held against what a file system takes."""
    nested = [field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)]
    schemas = [Config, *nested, *(schema for group in SCHEMAS.values() for schema in group.values())]
    found = set()
    for schema in schemas:
        for field in dataclasses.fields(schema):  # type: ignore[arg-type]
            named = field.name.endswith(("path", "_dir", "_folder", "_from")) and kinds(field.type) == {str}
            assert named == is_path(field), (
                f"declare {field.name} with file_path(…) of rsotrain/config/text.py"
            )
            found |= {field.name} if named else set()
    assert found >= {"path", "validation_path", "output_dir", "cache_dir", "init_from", "tasks_path"}


@pytest.mark.parametrize("prompts", [[["a"]], [{"a": 1}], ["a", ["b"]]])
def test_a_list_of_text_holds_no_lists(prompts: list[Any]) -> None:
    with pytest.raises(UserError, match=r"^generate\.prompts=.* must be a list of plain values$"):
        check_text(Config(generate=GenerateConfig(prompts=prompts)))
