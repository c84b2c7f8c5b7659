"""Which settings make a run what it is, and that fields added later leave the runs before them alone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import Cli
from helpers.run_folders import assert_same_tensors
from helpers.runs import compose

from rsotrain.config import keys
from rsotrain.config.identity import as_before, completed, identity, identity_of, run_name
from rsotrain.config.keys import flatten, later_fields, plain, with_values, without_keys
from rsotrain.config.later import later
from rsotrain.config.schema import ModelConfig
from rsotrain.errors import StoppedEarly, UserError
from rsotrain.report.comparison import differing_keys
from rsotrain.report.runs import read_run
from rsotrain.running.mode import train


def without_later_fields(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What an older version would have written."""
    old = {}
    for key, value in settings.items():
        value = without_later_fields(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        if f"{prefix}{key}" not in later_fields() and value != {}:
            old[key] = value
    return old


def test_later_fields_are_found_in_nested_dataclasses_with_their_defaults() -> None:
    fields = later_fields()
    assert fields["model.head_dim"].default is None
    assert fields["model.qk_norm"].default is False
    assert fields["model.rope_scaling.rope_type"].default == "default"
    assert fields["model.rope_scaling.factor"].default is None
    assert "model.hidden_size" not in fields
    decay = fields["optimizer.decay_norms_and_embeddings"]
    assert (decay.default, decay.before, decay.matters_with) == (False, True, "optimizer.weight_decay")
    assert fields["lr_scheduler.end"].before == "at_last_update"


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
        later_fields()


def test_a_later_field_is_part_of_the_identity_once_it_is_used() -> None:
    without, default = compose(["optimizer=adam"]), compose(["optimizer=adam", "model.qk_norm=false"])
    used = compose(["optimizer=adam", "model.qk_norm=true"])
    assert not set(later_fields()) & set(identity(without))
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
    assert completed(old) == dict(flatten(settings))  # and no later field of another optimizer or schedule


@pytest.mark.parametrize(
    ("choice", "key", "now", "before"),
    [
        ("optimizer=fira", "optimizer.residual_at_lr", True, False),
        ("optimizer=sn", "optimizer.bias_correction", "adam_form", "all_forms"),
        ("optimizer=sm", "optimizer.bias_correction", "adam_form", "all_forms"),
        ("optimizer=ldadam", "sampler.svd_first", True, False),
        ("optimizer=rso sampler=mixture", "sampler.unbiased", True, False),
        ("optimizer=osd", "sampler.weight_decay", None, 0.0),
    ],
)
def test_a_convention_that_has_changed_is_as_before_in_an_older_run(
    choice: str, key: str, now: object, before: object
) -> None:
    config = compose(choice.split())
    settings = plain(config)
    assert dict(flatten(settings))[key] == now
    old = without_keys(settings, later_fields(config))
    assert as_before(old, config) == {key: before}
    assert completed(old) == dict(flatten(settings)) | {key: before}
    as_it_began = with_values(config, {key: before})
    assert identity(as_it_began) == identity_of(old, config) != identity(config)
    assert key not in identity(as_it_began)


def test_a_sampler_of_the_same_older_keys_is_known_by_its_name() -> None:
    old = without_later_fields(plain(compose(["optimizer=carry"])))  # randomized_svd: name and rounds
    assert "sampler.svd_first" not in completed(old)


def test_a_decay_at_another_rate_counts_where_there_is_a_decay() -> None:
    flags = ["optimizer=galore", "optimizer.decay_at_lr=true"]
    assert identity(compose(flags)) == identity(compose(["optimizer=galore"]))
    assert identity(compose([*flags, "optimizer.weight_decay=0.1"]))["optimizer.decay_at_lr"] is True


def test_a_key_that_is_later_in_one_schema_and_old_in_another_counts_where_it_is_old() -> None:
    assert "optimizer.solver" not in identity(compose(["optimizer=galore"]))
    assert identity(compose(["optimizer=rso"]))["optimizer.solver"] == "adam"


@pytest.mark.slow
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


OLD = ["optimizer=adam", "optimizer.weight_decay=0.1", "lr_scheduler=linear"]


def test_what_is_otherwise_since_a_field_exists_is_as_before_in_an_older_run() -> None:
    now = compose(OLD)
    old = without_later_fields(plain(now))
    before = {"optimizer.decay_norms_and_embeddings": True, "lr_scheduler.end": "at_last_update"}
    assert as_before(old, now) == before
    as_it_began = with_values(now, before)
    assert as_it_began.optimizer.decay_norms_and_embeddings
    assert identity(as_it_began) == identity_of(old, now) == identity_of(old, as_it_began)
    assert {key: completed(old)[key] for key in before} == before
    assert {key: identity(now)[key] for key in before} == {
        "optimizer.decay_norms_and_embeddings": False,
        "lr_scheduler.end": "after_last_update",
    }
    # the command that made the old run finds its folder; one that says what it wants has another
    assert run_name(now) == run_name(compose(OLD))
    said = compose([*OLD, "optimizer.decay_norms_and_embeddings=true"])
    assert run_name(said) != run_name(now)
    assert as_before(old, said) == {"lr_scheduler.end": "at_last_update"}
    assert as_before(plain(now), now) == {}
    assert as_before(without_keys(plain(now), before), now) == before


def test_a_field_without_effect_makes_no_difference() -> None:
    without_decay = compose(["optimizer=adam"])
    old = without_later_fields(plain(without_decay))
    assert as_before(old, without_decay) == {}
    assert completed(old)["optimizer.decay_norms_and_embeddings"] is False
    assert "optimizer.decay_norms_and_embeddings" not in identity(without_decay)


# an earlier folder goes on with them, named in these words
CONVENTIONS = [
    (["optimizer=fira", "optimizer.lr=0.01"], {"optimizer.residual_at_lr": "false"}),
    (["optimizer=ldadam", "optimizer.lr=0.01"], {"sampler.svd_first": "false"}),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            (["optimizer=sn", "optimizer.betas=[0.9,1.0]"], {"optimizer.bias_correction": "all_forms"}),
            (["optimizer=rso", "sampler=mixture", "optimizer.lr=0.01"], {"sampler.unbiased": "false"}),
            (["optimizer=osd", "optimizer.weight_decay=0.5"], {"sampler.weight_decay": "0.0"}),
            (["optimizer=galore", "sampler=dct", "optimizer.lr=0.01"], {"sampler.storage": "stored"}),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "before"), CONVENTIONS)
def test_an_older_run_keeps_the_convention_it_began_with(
    tmp_path: Path, tiny: list[str], choice: list[str], before: dict[str, str]
) -> None:
    own = ["optimizer.decay_norms_and_embeddings=true"] if "optimizer.weight_decay=0.5" in choice else []
    command = [*tiny, *choice, *own, f"output_dir={tmp_path}"]
    explicit = [f"{key}={value}" for key, value in before.items()]
    last = "checkpoints/step_00000006"
    train(compose([*command, *explicit, "run_name=straight"]))
    train(compose([*command, "run_name=now"]))
    with pytest.raises(StoppedEarly):
        train(compose([*command, *explicit, "run_name=r", "max_seconds=0.001"]))
    file = tmp_path / "r/config.yaml"
    settings = without_keys(yaml.safe_load(file.read_text()), before)
    file.write_text(yaml.safe_dump(settings))
    train(compose([*command, "run_name=r"]))
    for words in explicit:
        assert f"goes on as it began, with {words}" in (tmp_path / "r/train.log").read_text()
    assert_same_tensors(tmp_path / "r" / last, tmp_path / "straight" / last)
    with pytest.raises(AssertionError):  # the convention makes a difference
        assert_same_tensors(tmp_path / "now" / last, tmp_path / "straight" / last)


@pytest.mark.slow
def test_an_older_run_goes_on_as_it_began_and_stays_old(tmp_path: Path, tiny: list[str]) -> None:
    command = [*tiny, *OLD, "optimizer.lr=0.01", "precision=bf16", f"output_dir={tmp_path}"]
    explicit = [
        "optimizer.decay_norms_and_embeddings=true",
        "lr_scheduler.end=at_last_update",
        "optimizer.weight_rounding=nearest",
    ]
    train(compose([*command, *explicit, "run_name=straight"]))

    def train_a_step(*more: str) -> None:
        with pytest.raises(StoppedEarly):
            train(compose([*command, *more, "run_name=r", "max_seconds=0.001"]))

    train_a_step(*explicit)
    folder = tmp_path / "r"
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(without_later_fields(yaml.safe_load(file.read_text()))))
    train_a_step()
    assert "end" not in yaml.safe_load(file.read_text())["lr_scheduler"]  # it is old still
    train(compose([*command, "run_name=r"]))
    said = (folder / "train.log").read_text()
    for key in explicit:
        assert said.count(f"goes on as it began, with {key}") == 2
    last = "checkpoints/step_00000006"
    assert_same_tensors(folder / last, tmp_path / "straight" / last)
    with pytest.raises(UserError, match=r"lr_scheduler\.end: None there, after_last_update here"):
        train(compose([*command, "run_name=straight"]))
