"""Keys of text keep what was written: on the command line, in sweeps over values, in YAML files."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.command import Cli
from helpers.runs import compose

from rsotrain.cli.overrides import normalise
from rsotrain.cli.sweep_file import check_sweep, configuration
from rsotrain.cli.text_keys import restore_text
from rsotrain.config.keys import keys_of
from rsotrain.errors import UserError

# What Hydra reads as an integer, a float, infinity, a truth value or, in a YAML file, as a date or minutes.
MISREAD = [
    "2026_11_26", "10_000", "3e563", "83e2010", "1e5", "1.50", ".5", "5.", "-0", "+7", "true", "False",
    "TRUE", "inf", "nan", "-inf", "0",
]  # fmt: skip
MISREAD_IN_YAML = [
    *MISREAD,
    "2026-11-26",
    "2026-11-26 10:00:00",
    "1:30",
    "0x10",
    "010",
    "0b11",
    "on",
    "Yes",
    "no",
]


def test_text_keys_are_those_that_are_text_in_every_schema() -> None:
    assert {
        "run_name",
        "output_dir",
        "data.config",
        "data.revision",
        "logger.wandb_tags",
        "model.name",
    } <= keys_of(str)
    assert not {"steps", "optimizer.rank", "optimizer.lr", "mode", "compile", "data.packing"} & keys_of(str)


@pytest.mark.parametrize("text", MISREAD)
def test_text_on_the_command_line_is_kept(text: str) -> None:
    config = compose(
        normalise([
            f"run_name={text}", f"++logger.wandb_group={text}", f"logger.wandb_tags=[{text},a,{text}]",
            f"checkpoint={{path: {text}}}", "data=hub", f"data.config={text}", f"data.revision={text}",
            "data.name=x", f"generate.prompts=[{text}]",
        ])
    )  # fmt: skip
    assert config.run_name == config.logger.wandb_group == config.checkpoint.path == text
    assert config.logger.wandb_tags == [text, "a", text]
    assert (config.data.config, config.data.revision) == (text, text)  # type: ignore[attr-defined]
    assert config.generate.prompts == [text]


@pytest.mark.parametrize("name", ["données", "a#b", "a;b", "a&b", "~a", "<a>", "a\nb", "名", "a!"])
def test_what_hydras_grammar_lacks_is_quoted(name: str) -> None:
    assert compose(normalise([f"run_name={name}"])).run_name == name


def test_null_numbers_and_quotes_mean_what_they_always_do() -> None:
    config = compose(
        normalise([
            "run_name=null", "cache_dir=None", "logger.wandb_group='1_0'",
            'logger.wandb_entity="null"', "steps=1_0", "optimizer.rank=1_0", "data.workers=null",
            "compile=true", "output_dir=${model.name}_1",
        ])
    )  # fmt: skip
    assert (config.run_name, config.cache_dir) == (None, None)
    assert (config.logger.wandb_group, config.logger.wandb_entity) == ("1_0", "null")
    assert (config.steps, config.optimizer.rank, config.compile) == (10, 10, True)  # type: ignore[attr-defined]
    assert config.output_dir == "llama_9m_1"


def test_only_what_would_change_is_touched() -> None:
    same = [
        "run_name=a_1", "run_name=2026-11-26", "run_name=00012", "run_name=1.2.3", "run_name='a'",
        "steps=1_000", "run_name=a=b", "run_name=a,", "-m", "--config-dir", "optimizer=adam,muon",
        "run_name=range(1,3)", "~run_name", "hydra.job.num=1_0", "optimizer.betas=[0.9,0.99]", "run_name=",
    ]  # fmt: skip
    assert normalise(same) == same
    changed = ["run_name=1_0,a,null", "run_name=choice(1_0,b)", "run_name=sort(2_0,1_0,reverse=true)"]
    assert normalise(changed) == [
        "run_name='1_0',a,null", "run_name=choice('1_0',b)", "run_name=sort('2_0','1_0',reverse=true)",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_sweep_over_text_makes_a_folder_for_each(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    result = cli("-m", "run_name=2026_11_26,3e563,true,données", *tiny, "steps=1")
    assert result.returncode == 0, result.stderr
    folders = {path.parent.name for path in (tmp_path / "outputs").glob("*/summary.json")}
    assert folders == {"2026_11_26", "3e563", "true", "données"}
    for name in folders:
        assert yaml.safe_load((tmp_path / "outputs" / name / "config.yaml").read_text())["run_name"] == name
    again = cli(*tiny, "steps=1", "run_name=3e563")
    assert "is finished already" in again.stdout


@pytest.mark.parametrize("text", MISREAD_IN_YAML)
def test_text_in_a_file_of_the_users_is_kept(text: str, tmp_path: Path, cli: Cli) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from rsotrain.cli.compose import register_schemas, to_config
    from rsotrain.config.defaults import conf_dir

    for folder in ("experiment", "model"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text(
        f"# @package _global_\nrun_name: {text}\nlogger:\n  wandb_tags: [&tag {text}, a, '1_0']\n"
        f"  wandb_group: *tag\n<<: {{output_dir: {text}}}\nsteps: 1_0\nlog_every: &n 2_0\ncache_dir: *n\n"
    )
    (tmp_path / "mine/model/own.yaml").write_text(
        f"defaults: [llama_tiny]\nname: {text}\nhidden_size: 1_28\n"
    )
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        search = f"hydra.searchpath=[{tmp_path / 'mine'}]"
        config = to_config(hydra_compose("config", [search, "experiment=own", "model=own"]))
    assert [config.run_name, config.logger.wandb_group, config.output_dir, config.model.name] == [text] * 4
    assert config.logger.wandb_tags == [text, "a", "1_0"]
    assert (config.steps, config.log_every, config.cache_dir, config.model.hidden_size) == (
        10,
        20,
        "2_0",
        128,
    )


def test_null_in_a_file_stays_null() -> None:
    node = yaml.compose("{run_name: null, cache_dir: ~, logger: {wandb_group: }, output_dir: 'null'}")
    loader = yaml.SafeLoader("")
    assert loader.construct_document(restore_text(node)) == {
        "run_name": None, "cache_dir": None, "logger": {"wandb_group": None}, "output_dir": "null",
    }  # fmt: skip


@pytest.mark.slow
def test_text_in_a_list_of_configurations_is_kept(tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    path = tmp_path / "list.yaml"
    path.write_text(
        "".join(
            f"- {{run_name: {text}, logger: {{wandb_tags: [{text}, b]}}, steps: 1_0, data.config: {text}}}\n"
            for text in MISREAD_IN_YAML
        )
        + "- steps=1_0 run_name=1_0\n"
    )
    for index, text in enumerate(MISREAD_IN_YAML):
        parsed = OverridesParser.create().parse_overrides(normalise(configuration(path, index)))
        assert {override.key_or_group: override.value() for override in parsed} == {
            "run_name": text, "logger.wandb_tags": [text, "b"], "steps": 10, "data.config": text,
        }  # fmt: skip
    assert normalise(configuration(path, len(MISREAD_IN_YAML))) == ["steps=1_0", "run_name='1_0'"]


def test_a_sweep_of_wandbs_wants_quotes_around_text(tmp_path: Path) -> None:
    """W&B reads the file itself."""
    path = tmp_path / "sweep.yaml"
    for values in ("[2026_11_26, b]", "[on]", "[3.0]", "[2026-11-26]"):
        content = (
            'command: ["${env}", rsotrain, "${args_no_hyphens}"]\nmethod: grid\n'
            f"parameters: {{run_name: {{values: {values}}}, steps: {{values: [1_0]}}}}\n"
        )
        with pytest.raises(UserError, match=r"parameter run_name is text, but YAML reads .* in quotes"):
            check_sweep(path, yaml.safe_load(content))
        quoted = json.dumps([value.strip() for value in values.strip("[]").split(",")])
        assert check_sweep(path, yaml.safe_load(content.replace(values, quoted))) in (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- a\n- b\n", "own.yaml must hold pairs of key: value"),
        (b"5\n", "own.yaml must hold pairs of key: value"),
        (b"steps: " + b"9" * 5000, "own.yaml cannot be read: Exceeds the limit"),
        (b"run_name: \xff\xfe", "own.yaml cannot be read: 'utf-8' codec"),
        (b"run_name: " + b"[" * 3000, "own.yaml cannot be read: maximum recursion depth"),
        (b"run_name: [1", "not valid YAML"),
        (b"compile: 7", "compile=7 must be true or false"),
        (b"logger: {wandb: -1}", "logger.wandb=-1 must be true or false"),
    ],
)
def test_a_file_that_is_no_configuration_gets_one_sentence(
    content: bytes, sentence: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_bytes(b"# @package _global_\n" + content)
    result = cli("--config-dir", "mine", "experiment=own")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert sentence in result.stderr


def test_a_list_with_a_date_that_does_not_exist_gets_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- {steps: 2026-13-45}\n")
    with pytest.raises(UserError, match=r"list\.yaml cannot be read: month must be in 1\.\.12"):
        configuration(path, 0)
