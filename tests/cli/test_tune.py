"""``mode=tune``: trials that are ordinary runs, the file that they end in, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.command import Cli, call_main

from rsotrain.cli import entry as command_line
from rsotrain.config.identity import identity
from rsotrain.config.schema import Config

OWN = ("steps=", "save_every=", "log_every=", "precision=")


@pytest.fixture
def quick(tiny: list[str]) -> list[str]:
    """A run of three steps that saves nothing before its end, of a method of one matrix product a step."""
    own = [word for word in tiny if not word.startswith(OWN)]
    return [*own, "optimizer=adam", "steps=3", "save_every=null", "log_every=3", "logger.progress=plain"]


def losses(folder: Path) -> dict[float, float]:
    """Value of optimizer.scale -> validation loss of the runs that have finished."""
    found = {}
    for summary in folder.glob("*/summary.json"):
        config = yaml.safe_load((summary.parent / "config.yaml").read_text())
        found[config["optimizer"]["scale"]] = json.loads(summary.read_text())["val/loss"]
    return found


@pytest.mark.slow
def test_a_search_ends_in_a_file_that_tuned_takes_and_a_second_start_trains_what_is_missing(
    cli: Cli, tmp_path: Path, quick: list[str]
) -> None:
    command = ["mode=tune", *quick, "optimizer.scale=8", "optimizer.eps=1e-6", "tune.factor=8"]
    result = cli(*command)
    assert (result.returncode, result.stderr) == (0, "")
    of_runs = losses(tmp_path / "outputs")
    best = min(of_runs, key=of_runs.__getitem__)
    assert of_runs[best / 8] > of_runs[best] < of_runs[best * 8]
    assert f"best at {best:g}\n" in result.stdout
    assert "outputs/conf/tuned/adam_llama_tiny.yaml: use it with rsotrain --config-dir" in result.stdout
    assert "Comparison" in result.stdout
    file = tmp_path / "outputs/conf/tuned/adam_llama_tiny.yaml"
    text = file.read_text()
    assert text.startswith("# @package _global_\n# Found for llama_tiny by rsotrain mode=tune ")
    assert f"{best:g}: {of_runs[best]:.4f}" in text.replace("\n# ", " ")
    # the settings that are not the method's own, and no others
    assert yaml.safe_load(text)["optimizer"] == {"lr": 0.02, "scale": best, "eps": 1e-6}

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/*/metrics.jsonl")}
    lost = next(path for path in times if f"scale: {best}" in (path.parent / "config.yaml").read_text())
    shutil.rmtree(lost.parent)
    again = cli(*command)
    assert again.stdout.count("\nrun llama_tiny") == 1
    assert file.read_text() == text
    assert losses(tmp_path / "outputs") == of_runs
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != lost)
    assert again.stdout.count("1 run ") == len(of_runs)  # the table has all, whoever trained them

    # the file gives the best run again, whose folder holds it
    used = cli("--config-dir", "outputs/conf", "tuned=adam_llama_tiny", *quick[:-5], *quick[-4:])
    assert "is finished already" in used.stdout


@pytest.mark.long
def test_the_search_goes_down_from_what_diverges(cli: Cli, tmp_path: Path, quick: list[str]) -> None:
    # decay multiplies the weights by -10^9 a step, and at the best of these values by 0
    command = ["mode=tune", *quick, "optimizer.lr=1", "optimizer.weight_decay=1000", "steps=5",
               "optimizer.scale=1e6", "tune.factor=1000", "tune.lowest=5e-4"]  # fmt: skip
    result = cli(*command)
    assert result.returncode == 0
    (line,) = (line for line in result.stdout.splitlines() if "optimizer.scale 0.001: " in line)
    assert "; 1e+06: diverged; best at " in line
    records = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/*/run.json")]
    states = [(record["state"], record.get("diverged")) for record in records]
    assert states.count(("failed", True)) == line.count("diverged") >= 1
    assert states.count(("finished", None)) == len(states) - line.count("diverged") >= 1
    again = cli(*command)  # nor are these trained again
    assert "run llama_tiny" not in again.stdout
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.slow
def test_several_searches_each_with_the_mean_over_its_seeds(
    cli: Cli, tmp_path: Path, quick: list[str]
) -> None:
    result = cli(
        "mode=tune", *quick, "optimizer=galore", "optimizer.rank=8,16", "seed=0,1", "tune.factor=4",
        "tune.lowest=0.2", "tune.highest=1.1", "tune.path=mine",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert "galore_llama_tiny_rank8: optimizer.scale=0.25 seed=1" in result.stdout
    files = sorted((tmp_path / "mine/tuned").iterdir())
    assert [file.name for file in files] == [f"galore_llama_tiny_rank{rank}.yaml" for rank in (16, 8)]
    for file, rank in zip(files, (16, 8), strict=True):
        assert yaml.safe_load(file.read_text())["optimizer"]["rank"] == rank
        assert "but not tuned: it is the " in file.read_text().replace("\n# ", " ")
    of_rank_8 = [
        (run.parent, json.loads(run.read_text())["val/loss"])
        for run in tmp_path.glob("outputs/*/summary.json")
        if "rank: 8\n" in (run.parent / "config.yaml").read_text()
    ]
    assert len(of_rank_8) == 4
    mean = sum(loss for run, loss in of_rank_8 if "scale: 0.25\n" in (run / "config.yaml").read_text()) / 2
    assert f"galore_llama_tiny_rank8: optimizer.scale 0.25: {mean:.4f}; 1: " in result.stdout


REFUSED = [
    (["tune.key=steps"], "tune.key=steps is neither the method's nor the schedule's"),
    (["tune.key=optimizer.scal"], "there is no such key in this configuration; did you mean optimizer.scale"),
    (["tune.key=optimizer.name"], "tune.key=optimizer.name is rso_pca, and only a number can be tuned"),
    (["tune.key=optimizer.betas"], "only a number can be tuned"),
    (["tune.key=optimizer.weight_decay"], "0.0 has no multiples to try; give a first value with optimizer.w"),
    (["tune.key=grad_clip"], "null has no multiples to try; give a first value with grad_clip=…"),
    (["optimizer.scale=0.1,0.2"], "optimizer.scale is what is tuned, so several values of it say nothing"),
    (["tune.factor=1"], "tune.factor=1.0 must be larger than 1"),
    (["tune.lowest=1"], "optimizer.scale=0.0625 is none of the values that tune.lowest and tune.highest lea"),
    (["tune.lowest=0.06", "tune.highest=0.07"], "tune.factor=2 makes no other value of optimizer.scale=0.06"),
    (["tune.name=a/b"], "tune.name=a/b must be the name of one folder"),
    (["tune.name=x", "optimizer=adam,rso"], "tune.name=x is for one file, and these are 2 searches"),
    ([f"tune.path={__file__}/x"], "test_tune.py is not a folder"),
    (["optimizer.lr=-1"], "optimizer.lr=-1.0 must not be negative"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_sentence_before_the_first_trial(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call_main(command_line, ["mode=tune", f"output_dir={tmp_path}/o", *overrides]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_its_keys_are_for_this_mode_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main(command_line, ["tune.factor=3"]) == 2
    assert "tune.factor is for mode=tune; leave it out of mode=train" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_for_another_reason_ends_the_search(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [*quick, f"output_dir={tmp_path}/o", "optimizer=galore"]
    assert call_main(command_line, ["mode=tune", *own, "optimizer.rank=9999"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("optimizer.rank=9999 is larger than the projected dimension") == 1
    assert captured.out.endswith("this run; once that is mended, the same command goes on\n")


def test_what_a_search_is_to_do_makes_no_run_another() -> None:
    from helpers.runs import compose

    def of(*overrides: str) -> Config:
        return compose([*overrides])

    assert identity(of("tune.factor=3")) == identity(of())
