"""Which settings make a run what it is, and that fields added later leave the runs before them alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import Cli
from helpers.runs import compose

from rsotrain.config import keys
from rsotrain.config.identity import completed, identity, identity_of, run_name
from rsotrain.config.keys import flatten, later_defaults, plain
from rsotrain.config.later import later
from rsotrain.config.schema import ModelConfig
from rsotrain.report.comparison import differing_keys
from rsotrain.report.runs import read_run


def without_later_fields(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What an older version would have written."""
    old = {}
    for key, value in settings.items():
        value = without_later_fields(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        if f"{prefix}{key}" not in later_defaults() and value != {}:
            old[key] = value
    return old


def test_later_fields_are_found_in_nested_dataclasses_with_their_defaults() -> None:
    defaults = later_defaults()
    assert defaults["model.head_dim"] is None
    assert defaults["model.qk_norm"] is False
    assert defaults["model.rope_scaling.rope_type"] == "default"
    assert defaults["model.rope_scaling.factor"] is None
    assert "model.hidden_size" not in defaults


def test_a_later_field_keeps_what_else_its_field_says() -> None:
    made = later(dataclasses.field(default=3, metadata={"ranges": "kept"}))
    assert made.default == 3
    assert made.metadata["ranges"] == "kept"
    assert later(dataclasses.field(default_factory=list)).default_factory is list


def test_one_key_with_two_later_defaults_is_a_mistake_of_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Other(ModelConfig):
        qk_norm: bool = later(True)

    monkeypatch.setitem(keys.SCHEMAS["model"], "other", Other)
    with pytest.raises(AssertionError, match=r"model\.qk_norm has two defaults"):
        later_defaults()


def test_a_later_field_is_part_of_the_identity_once_it_is_used() -> None:
    without, default = compose(["optimizer=adam"]), compose(["optimizer=adam", "model.qk_norm=false"])
    used = compose(["optimizer=adam", "model.qk_norm=true"])
    assert not set(later_defaults()) & set(identity(without))
    assert run_name(without) == run_name(default) != run_name(used)
    assert identity(used) == identity(without) | {"model.qk_norm": True}
    scaled = compose(["optimizer=adam", "model.rope_scaling.rope_type=linear", "model.rope_scaling.factor=2"])
    assert identity(scaled) == identity(without) | {
        "model.rope_scaling.rope_type": "linear",
        "model.rope_scaling.factor": 2.0,
    }


def test_settings_from_before_a_field_have_the_same_identity() -> None:
    config = compose(["optimizer=galore"])
    settings = plain(config)
    old = without_later_fields(settings)
    assert "rope_scaling" not in old["model"]
    assert identity_of(old, config) == identity(config)
    assert completed(old) == dict(flatten(settings))


def test_a_key_that_is_later_in_one_schema_and_old_in_another_counts_where_it_is_old() -> None:
    assert "optimizer.solver" not in identity(compose(["optimizer=galore"]))
    assert identity(compose(["optimizer=rso"]))["optimizer.solver"] == "adam"


def test_a_run_folder_from_before_a_field_goes_on_and_its_report_reads(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    command = [*tiny, "optimizer=adam", "run_name=r"]
    assert cli(*command, "max_seconds=0.001").returncode == 75
    file = tmp_path / "outputs/r/config.yaml"
    file.write_text(yaml.safe_dump(without_later_fields(yaml.safe_load(file.read_text()))))
    refused = cli(*command, "model.qk_norm=true")
    assert refused.returncode == 2
    assert "model.qk_norm: None there, True here" in refused.stderr
    old = read_run(tmp_path / "outputs/r")
    assert cli(*command).returncode == 0
    assert "resumed from" in (tmp_path / "outputs/r/train.log").read_text()
    assert differing_keys([old, read_run(tmp_path / "outputs/r")], also=["model"]) == []
