"""A run of a varied model through the command: trained, resumed, evaluated, planned, exported, continued."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import Cli
from helpers.run_folders import assert_same_tensors
from helpers.runs import compose

from rsotrain.cli.dispatch import run_mode
from rsotrain.config.validation import validate
from rsotrain.errors import UserError
from rsotrain.planner.plan import make_plan

VARIED = [
    "model.qk_norm=true", "model.attention_bias=true", "model.head_dim=24", "model.num_key_value_heads=2",
    "model.rope_scaling.rope_type=llama3", "model.rope_scaling.factor=4",
    "model.rope_scaling.low_freq_factor=1", "model.rope_scaling.high_freq_factor=4",
    "model.rope_scaling.original_max_position_embeddings=64",
]  # fmt: skip


@pytest.mark.slow
def test_a_varied_model_goes_through_every_mode(
    cli: Cli, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [*tiny, "optimizer=rso", "optimizer.update_proj_gap=2"]
    command = [*own, *VARIED]
    assert cli(*command, "run_name=straight").returncode == 0
    assert cli(*command, "run_name=r", "max_seconds=0.001").returncode == 75
    assert cli(*command, "run_name=r").returncode == 0
    run = tmp_path / "outputs/r"
    assert "resumed from" in (run / "train.log").read_text()
    assert_same_tensors(
        run / "checkpoints/step_00000006", tmp_path / "outputs/straight/checkpoints/step_00000006"
    )
    summary = json.loads((run / "summary.json").read_text())
    monkeypatch.chdir(tmp_path)

    def here(*arguments: str) -> dict[str, Any]:
        config = compose([*own, *arguments])  # of another model: the run's own is the one that counts
        validate(config)
        return run_mode(config)

    assert here("mode=evaluate", "checkpoint.path=outputs/r")["val/loss"] == pytest.approx(
        summary["val/loss"]
    )
    drawn = here("mode=generate", "checkpoint.path=outputs/r", "generate.max_new_tokens=4")
    assert drawn["samples"]
    here("mode=export", "checkpoint.path=outputs/r")
    assert json.loads((run / "export/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    exported = here("mode=evaluate", "checkpoint.path=outputs/r/export")
    assert exported["val/loss"] == pytest.approx(summary["val/loss"])
    continued = cli(
        *[o for o in own if not o.startswith(("model=", "tokenizer."))], "model=pretrained",
        f"model.init_from={run}/export", "tokenizer=huggingface", "tokenizer.path=${model.init_from}",
        "optimizer.lr=0", "steps=1", "run_name=c",
    )  # fmt: skip
    assert continued.returncode == 0, continued.stderr
    after = json.loads((tmp_path / "outputs/c/summary.json").read_text())
    assert after["val/loss"] == pytest.approx(summary["val/loss"], rel=1e-5)
    refused = cli(*own, "run_name=r")
    assert refused.returncode == 2
    assert "model.head_dim: 24 there, None here" in refused.stderr


@pytest.mark.slow
def test_a_plan_counts_biases_and_gains(tiny: list[str]) -> None:
    """Of two ranks, whose formula is that of the optimizer itself."""
    parallel = ["parallelism=fsdp", "parallelism.world_size=2", "mode=plan"]
    plans = [
        make_plan(compose([*tiny, "optimizer=rso", *parallel, *varied]), gpus=False)
        for varied in ([], ["model.attention_bias=true", "model.mlp_bias=true", "model.qk_norm=true"])
    ]
    for plan in plans:
        assert plan.optimizer_state.total == plan.formula_state.total
    elements = 2 * (4 * 64 + 2 * 176 + 64 + 2 * 16)  # biases of q, k, v, o, gate, up and down, and gains
    more = plans[1].parameters.total - plans[0].parameters.total
    assert more == 4 * elements // 2
    assert plans[1].optimizer_state.total - plans[0].optimizer_state.total == 2 * more
    assert plans[1].flops_per_token == plans[0].flops_per_token


@pytest.mark.slow
def test_a_run_whose_configuration_is_damaged_is_one_sentence(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    assert cli(*tiny, "optimizer=adam", "run_name=r", "steps=1").returncode == 0
    file = tmp_path / "outputs/r/config.yaml"
    settings = yaml.safe_load(file.read_text())
    for model, sentence in (
        (settings["model"] | {"hidden_size": "wide"}, "describes no model: model.hidden_size is 'wide'"),
        (settings["model"] | {"rope_scaling": [1]}, "describes no model: model.rope_scaling is no mapping"),
        (settings["model"] | {"mlp": "moe"}, "model.mlp=moe does not exist"),
        (
            settings["model"] | {"intermediate_size": 180},
            "config.yaml describes: model.layers.0.mlp.down_proj.weight is 64x176 there and 64x180 in this",
        ),
    ):
        file.write_text(yaml.safe_dump(settings | {"model": model}))
        config = compose([*tiny, "optimizer=adam", "mode=generate", f"checkpoint.path={tmp_path}/outputs/r"])
        with pytest.raises(UserError, match=re.escape(sentence)) as caught:
            run_mode(config)
        assert "\n" not in str(caught.value)
