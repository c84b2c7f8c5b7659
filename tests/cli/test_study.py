"""The study: the same runs from a multirun, a job array and a W&B sweep; a report at the end."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import ROOT, Cli, call_main
from helpers.runs import compose

from rsotrain.cli import entry as command_line
from rsotrain.cli.sweep_file import check_sweep, read_list
from rsotrain.config.identity import identity
from rsotrain.config.schema import Config
from rsotrain.config.validation import validate
from rsotrain.errors import UserError
from rsotrain.training.composition import check_composition

METHODS = sorted(path.stem for path in (ROOT / "conf/optimizer").glob("*.yaml"))


def params(experiment: str) -> dict[str, Any]:
    """What a multirun of the experiment sweeps over."""
    text = (ROOT / f"conf/experiment/{experiment}.yaml").read_text()
    return dict(yaml.safe_load(text)["hydra"]["sweeper"]["params"])


def test_every_method_has_tuned_rates() -> None:
    assert sorted(path.stem for path in (ROOT / "conf/tuned").glob("*.yaml")) == METHODS
    assert sorted(params("study")["tuned"].split(",")) == METHODS


@pytest.fixture(scope="module")
def of_adam() -> Config:
    return compose(["experiment=study"])


@pytest.mark.parametrize("method", METHODS)
def test_a_member_of_the_study(method: str, of_adam: Config) -> None:
    config = compose(["experiment=study", f"tuned={method}"])
    validate(config)
    check_composition(config)
    assert config.optimizer.name == method
    assert config.sampler == compose([f"optimizer={method}"]).sampler  # the method's own
    adam = identity(of_adam)
    differing = [key for key, value in identity(config).items() if value != adam.get(key)]
    assert all(key.startswith(("optimizer.", "sampler.")) for key in differing)  # equal data, steps, tokens


@pytest.mark.slow
def test_the_quick_study_has_the_same_rates_and_the_command_line_wins() -> None:
    quick = compose(["experiment=study_quick", "tuned=galore"])
    assert quick.optimizer == compose(["tuned=galore"]).optimizer
    assert compose(["experiment=study", "tuned=galore", "optimizer.lr=0.5"]).optimizer.lr == 0.5


PLAN = ["mode=plan", "model=llama_tiny", "tokenizer.vocab_size=1024", "seq_len=32", "batch_size=4"]


@pytest.mark.parametrize(
    ("overrides", "tuned", "optimizer", "advice"),
    [
        (["experiment=study", "optimizer=galore"], "adam", "galore", "say tuned=galore instead of"),
        (["tuned=galore", "optimizer=rso"], "galore", "rso", "say tuned=rso instead of optimizer=rso"),
        (["tuned=frugal", "optimizer=carry"], "frugal", "carry", "say tuned=carry instead of"),  # same class
        (["experiment=galore_60m", "tuned=rso"], "rso", "galore", "leave tuned=rso out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_rates_of_another_method_are_refused(
    overrides: list[str], tuned: str, optimizer: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(command_line, ["mode=plan", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"rsotrain: conf/tuned/{tuned}.yaml has {tuned}'s rates, but the optimizer is {optimizer}; {advice}"
    )
    assert error.count("\n") == 1


@pytest.mark.slow
def test_only_the_mixed_members_of_a_multirun_are_refused(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine/tuned/mine.yaml"  # a file of the user's own bears any name
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndefaults: [override /optimizer: adam, _self_]\n")
    result = cli("--config-dir", "mine", "-m", "tuned=sn,adam,mine", "optimizer=adam", *PLAN)
    assert result.returncode == 2
    assert result.stderr == (
        "rsotrain: conf/tuned/sn.yaml has sn's rates, but the optimizer is adam;"
        " say tuned=adam instead of optimizer=adam\n"
    )
    assert "adam" in result.stdout  # the plans of the others


def test_array_and_sweep_are_the_runs_of_the_multirun() -> None:
    swept = params("study")
    expected = {
        ("experiment=study", f"tuned={method}", f"seed={seed}")
        for method in swept["tuned"].split(",")
        for seed in str(swept["seed"]).split(",")
    }
    lines = read_list(ROOT / "sweeps/study.txt")
    assert len(lines) == len(expected) == 99
    assert {tuple(line) for line in lines} == expected
    sweep = yaml.safe_load((ROOT / "sweeps/study.yaml").read_text())
    assert check_sweep(Path("study.yaml"), sweep) == 99
    assert sweep["parameters"]["tuned"]["values"] == swept["tuned"].split(",")
    assert ",".join(map(str, sweep["parameters"]["seed"]["values"])) == swept["seed"]
    assert "--array=0-98 " in (ROOT / "sweeps/study.txt").read_text()


def test_the_report_is_validated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.claims=true .* report\.path=…"):
        validate(compose(["report.claims=true"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report\.path=.* is not a folder"):
        validate(compose([f"report.path={tmp_path}/file/report"]))
    with_one, without = compose([f"report.path={tmp_path}"]), compose([])
    assert identity(with_one) == identity(without)  # a run is the same with and without


@pytest.mark.slow
def test_a_multirun_ends_in_a_report_and_a_second_one_trains_nothing(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    own = [o for o in tiny if not o.startswith("save_every")]
    command = ["-m", "experiment=study_quick", "tuned=adam,rso", "optimizer.lr=0.01", *own]
    result = cli(*command)
    assert (result.returncode, result.stderr) == (0, "")
    folder = tmp_path / "outputs/study_quick"
    assert len(list(folder.glob("llama_tiny-*/summary.json"))) == 2
    assert "Comparison" in result.stdout
    assert "1. RSO and GaLore come close to Adam" in result.stdout
    text = (folder / "report/report.md").read_text()
    assert text.startswith("# Comparison: study_quick\n")
    # both make the inputs of their linears again, and RSO keeps Z beside
    assert re.search(r"rso has less than adam \(.*\) \| not confirmed \|", text)
    assert "Written by `rsotrain -m experiment=study_quick tuned=adam,rso " in text
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    (folder / "report/report.md").unlink()
    again = cli(*command)
    assert again.stdout.count("is finished already") == 2
    assert (folder / "report/report.md").read_text() == text
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")} == before
    cli(*(word.replace("tuned=adam,rso", "tuned=rso") for word in command))  # a part of the study again
    assert (folder / "report/report.md").read_text() == text.replace("tuned=adam,rso", "tuned=rso")


@pytest.mark.slow
def test_pictures_that_cannot_be_drawn_are_missed_before_the_first_run(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "broken/matplotlib").mkdir(parents=True)
    (tmp_path / "broken/matplotlib/__init__.py").write_text("raise ImportError('none here')")
    path = {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    result = cli("-m", "experiment=study_quick", "tuned=adam,rso", *tiny, **path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'rsotrain[report]', or go without" in result.stderr
    assert not (tmp_path / "outputs").exists()
