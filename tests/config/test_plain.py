"""Dataclasses as what YAML holds, and back."""

import json
from typing import Any

import pytest
from helpers.command import ROOT
from helpers.runs import OPTIMIZERS, compose

from rsotrain.config.keys import from_plain, plain
from rsotrain.config.model import ModelConfig, RopeScalingConfig
from rsotrain.config.schema import Config

MODELS = sorted(p.stem for p in (ROOT / "conf/model").glob("*.yaml") if p.stem != "pretrained")


@pytest.mark.parametrize("choice", [*(f"optimizer={o}" for o in OPTIMIZERS), *(f"model={m}" for m in MODELS)])
def test_what_was_written_is_read_again(choice: str) -> None:
    config = compose([choice, *([] if choice.startswith("optimizer") else ["optimizer=adam"])])
    for part in (config.model, config.optimizer, config.sampler, config.data, config.logger):
        values = json.loads(json.dumps(plain(part)))
        assert plain(from_plain(type(part), values)) == values


def test_nested_missing_and_unknown_fields() -> None:
    values = {"hidden_size": 8, "rope_theta": 5, "rope_scaling": {"rope_type": "linear", "factor": 2}, "x": 1}
    read = from_plain(ModelConfig, values)
    assert read == ModelConfig(hidden_size=8, rope_theta=5.0, rope_scaling=RopeScalingConfig("linear", 2.0))
    assert isinstance(read.rope_theta, float)
    assert from_plain(Config, {"mode": "plan", "seed": 3}).mode.value == "plan"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["hidden_size"], "it is no mapping"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"hidden_size": True}, "hidden_size is 'True'"),
        ({"hidden_size": None}, "hidden_size is 'None'"),
        ({"qk_norm": 1}, "qk_norm is '1'"),
        ({"rope_scaling": 3}, "rope_scaling is no mapping"),
        ({"rope_scaling": {"factor": []}}, r"rope_scaling\.factor is '\[\]'"),
    ],
)
def test_a_value_of_another_type_is_named(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_plain(ModelConfig, values)
