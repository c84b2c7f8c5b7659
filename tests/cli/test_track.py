"""The memory track: its members keep within their budgets, and are what its experiment sweeps over."""

import csv
from functools import cache
from pathlib import Path

import pytest
import yaml
from helpers.command import ROOT, Cli, call_main
from helpers.runs import compose

from rsotrain.cli import entry as command_line
from rsotrain.config.identity import identity
from rsotrain.config.validation import validate
from rsotrain.optim.formulas import state_bytes
from rsotrain.training.composition import check_composition

MEMBERS = sorted(path.stem for path in (ROOT / "conf/tuned/track").glob("*.yaml"))
# Model, and the tokenizer's pieces: with these embedding and head are more than a half of llama_60m, too.
MODELS = (("llama_9m", 4096), ("llama_20m", 4096), ("llama_60m", 32000))
VECTORS_ONLY = 0.01  # what 0 % stands for


@cache
def bytes_of_adam(model: str, vocab_size: int) -> int:
    return state_bytes(compose([f"model={model}", "optimizer=adam"]), vocab_size).total


@pytest.mark.slow
@pytest.mark.parametrize(("model", "vocab_size"), MODELS)
@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_keeps_within_its_budget(member: str, model: str, vocab_size: int) -> None:
    config = compose([f"model={model}", f"tuned=track/{member}"])
    share = state_bytes(config, vocab_size).total / bytes_of_adam(model, vocab_size)
    budget = int(member.rpartition("_")[2])
    assert share <= (budget / 100 or VECTORS_ONLY)
    lower = {50: 0.25, 25: 0.12, 12: VECTORS_ONLY, 0: 0.0}[budget]
    assert share > lower  # else it belongs to the next budget


def test_the_experiment_sweeps_over_adam_and_all_members() -> None:
    track = yaml.safe_load((ROOT / "conf/experiment/track.yaml").read_text())
    params = track["hydra"]["sweeper"]["params"]
    swept = params["tuned"].split(",")
    assert swept[0] == "adam"
    assert sorted(swept[1:]) == [f"track/{member}" for member in MEMBERS]
    assert params["seed"] == "0,1,2"


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_composes_on_adams_job(member: str) -> None:
    config = compose(["experiment=track", f"tuned=track/{member}"])
    validate(config)
    check_composition(config)
    adam = identity(compose(["experiment=track"]))
    differing = [key for key, value in identity(config).items() if value != adam.get(key)]
    assert all(key.startswith(("optimizer.", "sampler.")) for key in differing)
    assert config.optimizer.name == member.rpartition("_")[0]


def test_a_member_with_another_optimizer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main(command_line, ["mode=plan", "tuned=track/muon_25", "optimizer=normuon"]) == 2
    error = capsys.readouterr().err
    assert "conf/tuned/track/muon_25.yaml has muon's rates, but the optimizer is normuon" in error


@pytest.mark.long
def test_the_command_ends_in_figure_and_tables(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    own = [word for word in tiny if not word.startswith(("steps=", "save_every="))]
    members = "tuned=adam,track/galore_25,track/scale_0"
    result = cli("-m", "experiment=track", *own, members, "seed=0", "steps=2", "save_every=null")
    assert result.returncode == 0
    assert "One seed each: a difference may be chance." in result.stdout
    report = tmp_path / "outputs/track/report"
    for name in ("front.png", "front_dark.png", "front.svg", "front.tex"):
        assert (report / name).stat().st_size > 100
    with open(report / "front.csv", newline="") as file:
        shares = {row["group"].split()[0]: float(row["share of adam"]) for row in csv.DictReader(file)}
    assert shares["adam"] == 1.0
    assert 0.12 < shares["galore"] <= 0.25
    assert shares["scale"] <= VECTORS_ONLY
