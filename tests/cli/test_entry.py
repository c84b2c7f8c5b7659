"""The command line: help, composition, and one sentence for every mistake."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.command import ROOT, Cli, call_main

from rsotrain.cli.multirun import print_comparison
from rsotrain.cli.overrides import normalise
from rsotrain.config.keys import did_you_mean, known_keys
from rsotrain.config.schema import ReportConfig


def options(group: str) -> set[str]:
    return {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")}


def listed(shown: str, group: str) -> list[str]:
    """The options of a group in the help, which continues long lists on indented lines."""
    paragraph = re.search(rf"^  {group}: (.*(?:\n    .*)*)", shown, re.MULTILINE)
    assert paragraph
    return re.split(r",\s+", paragraph[1])


def test_help_lists_every_group_and_imports_nothing_heavy(cli: Cli) -> None:
    result = cli("--help")
    assert result.returncode == 0
    for group in (
        "model", "optimizer", "sampler", "data", "tokenizer", "lr_scheduler", "logger", "experiment",
    ):  # fmt: skip
        found = listed(result.stdout, group)
        assert set(found) == options(group)
        assert len(found) == len(options(group))
    sizes = ["galore_60m", "galore_130m", "galore_350m", "galore_1b", "galore_7b"]
    assert [name for name in listed(result.stdout, "experiment") if name.startswith("galore_")] == sizes
    assert "protocol" not in result.stdout  # what recipes share is no option
    assert "schema" not in result.stdout
    code = (
        "import sys; sys.argv = ['rsotrain', '--help']\n"
        "from rsotrain.cli.entry import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'wandb', 'datasets', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_import_of_the_package_is_quick() -> None:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import rsotrain"], check=True)
    with_package = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    # A ratio to a bare interpreter, with slack for a loaded machine: torch alone would add two seconds.
    assert with_package < (time.perf_counter() - start) + 1.0


MISTAKES = [
    (["optimizer.lrr=3"], "unknown key optimizer.lrr; did you mean optimizer.lr"),
    (["foo=1"], "unknown key foo"),
    (["+foo=1"], "unknown key foo"),
    (["+optimizer.foo=1"], "unknown key optimizer.foo"),
    (["modle=llama_9m"], "unknown key modle; did you mean mode, model"),
    (["optimizer=adm"], "optimizer=adm does not exist; did you mean adam"),
    (["model=llama_61m"], "model=llama_61m does not exist; did you mean llama_"),
    (["steps=abc"], "steps=abc must be a whole number"),
    (["steps=10.5"], "steps=10.5 must be a whole number"),
    (["device=tpu"], "device=tpu does not exist; did you mean cpu? (there are: auto, cpu, cuda)"),
    (["run_name=a=b"], "'run_name=a=b' is not of the form key=value"),
    (["steps=0"], "steps=0 must be positive"),
    (["optimizer.lr=-1"], "optimizer.lr=-1.0 must not be negative"),
    (["optimizer.lr=nan"], "optimizer.lr=nan must be a finite number"),
    (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9] must be two numbers, the first in [0, 1)"),
    (["seq_len=2048"], "seq_len=2048 is longer than model.max_position_embeddings=1024"),
    (["batch_size=16", "micro_batch_size=3"], "batch_size=16 is not divisible by micro_batch_size=3"),
    (["optimizer=galore", "optimizer.rank=900"], "rank=900 is larger than the projected dimension (128)"),
    (["optimizer=galore", "sampler=none"], "optimizer=galore needs a sampler"),
    (["optimizer=adam", "sampler=svd"], "optimizer=adam has no subspace"),
    (["data=files"], "data.path has no value; give it with data.path="),
    (["data=files", "data.path=/n/a", "data.validation_path=/n/a"], "data.path=/n/a is neither a file"),
    (["lr_scheduler.warmup_fraction=1.5"], "lr_scheduler.warmup_fraction=1.5 must lie in [0, 1]"),
    (["lr_scheduler=wsd", "lr_scheduler.decay_fraction=0.95"], "take more than all the steps"),
    (["optimizer=fira", "optimizer.max_growth=0.5"], "optimizer.max_growth=0.5 must be at least 1"),
    (["optimizer=muon", "optimizer.ns_steps=200"], "optimizer.ns_steps=200 must be at most 99"),
    (["optimizer=ldadam", "optimizer.rho=5"], "optimizer.rho=5.0 must lie in [0, 1]"),
    (["model.num_attention_heads=5"], "does not split into model.num_attention_heads=5 heads"),
    (["model.vocab_size=100"], "model.vocab_size=100 is smaller than the tokenizer's 4096 pieces"),
    (["output_dir=/proc/here"], "output_dir=/proc/here cannot be written"),
    (["~steps"], "steps has no value; give it with steps="),
    (["steps=1e999"], "steps=inf must be a whole number"),
    (["lr_scheduler=constant", "lr_scheduler.min_ratio=0.1"], "lr_scheduler=constant has no key lr_sch"),
    (["optimizer.lr=${nope}"], "optimizer.lr: Interpolation key 'nope' not found"),
    (["optimizer=sn_sm", "sampler=gaussian"], "optimizer=sn_sm with sampler=gaussian"),
    (["run_name=a/b"], "run_name=a/b must be the name of one folder"),
    *(
        ([f"{group}=null"], f"{group}=null chooses no option; leave it out")
        for group in ("model", "optimizer", "sampler", "data", "tokenizer", "experiment", "tuned")
    ),
    (["tuned=[adam]", "optimizer=muon"], "tuned=[adam]: a run has one method's rates"),
    (["experiment=study", "tuned=None"], "tuned=null chooses no option; leave it out, or write ~tuned where"),
    (["-m", "model=llama_tiny,null"], "model=null chooses no option"),
    (["model=1"], "model=1 chooses no option"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_gets_one_sentence_and_status_2(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rsotrain.cli import entry as cli

    # In this process: a new one for each mistake would spend most of its time importing.
    status = call_main(cli, [f"output_dir={tmp_path}", *arguments])
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("rsotrain: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert status == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_not_held_against_the_next_command_of_a_process(tmp_path: Path) -> None:
    from rsotrain.cli import entry as cli

    assert call_main(cli, [f"output_dir={tmp_path}", "steps=0"]) == 2
    assert call_main(cli, [f"output_dir={tmp_path}", "--cfg", "job"]) == 0


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(cli: Cli) -> None:
    result = cli("steps=0")
    assert (result.returncode, result.stderr) == (2, "rsotrain: steps=0 must be positive\n")
    assert "Traceback" in cli("steps=0", HYDRA_FULL_ERROR="1").stderr


def test_several_processes_are_refused_by_parallelism_single(cli: Cli) -> None:
    result = cli("steps=1", WORLD_SIZE="2")
    assert result.returncode == 2
    assert "parallelism=single is for one process, but 2 were started" in result.stderr


def test_broken_yaml_names_file_and_line(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    (folder / "broken.yaml").write_text("name: x\n  hidden_size: [1\n")
    result = cli("--config-dir", "mine", "model=broken")
    assert result.returncode == 2
    assert "broken.yaml, line 2: not valid YAML" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_config_dir_adds_a_group_option(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    folder = tmp_path / "mine" / "model"
    folder.mkdir(parents=True)
    (folder / "mini.yaml").write_text("defaults: [llama_tiny]\nname: mini\nnum_hidden_layers: 1\n")
    overrides = [o for o in tiny if not o.startswith(("model=", "steps="))]
    assert ", mini" in cli("--config-dir", "mine", "--help").stdout
    result = cli("--config-dir", "mine", "model=mini", "steps=1", "run_name=r", *overrides)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((tmp_path / "outputs/r/config.yaml").read_text())["model"]["num_hidden_layers"] == 1


def test_values_as_other_programs_write_them() -> None:
    given = [
        "steps=1000000000.0", "batch_size=1e1,2e1", "grad_clip=None", "optimizer.lr=1.0", "run_name='None'",
        "optimizer.rank=1.0", "optimizer.betas=[0.9, 0.99]", "-m",
    ]  # fmt: skip
    assert normalise(given) == [
        "steps=1000000000", "batch_size=10,20", "grad_clip=null", "optimizer.lr=1.0", "run_name='None'",
        "optimizer.rank=1.0", "optimizer.betas=[0.9, 0.99]", "-m",
    ]  # fmt: skip


def test_did_you_mean() -> None:
    assert did_you_mean("optimizer.learning", known_keys()).startswith("; did you mean ")
    assert did_you_mean("zzzzqqq", known_keys()) == ""


def test_multirun_goes_on_after_a_refused_member(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    result = cli("-m", "optimizer.lr=-1,0.01", "steps=1", *[o for o in tiny if not o.startswith("steps=")])
    assert result.returncode == 2
    assert "optimizer.lr=-1.0 must not be negative" in result.stderr
    summaries = list((tmp_path / "outputs").glob("*/summary.json"))
    assert [json.loads(p.read_text())["finished"] for p in summaries] == [True]


@pytest.mark.slow
def test_multirun_ends_with_a_comparison_of_its_members(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    result = cli("-m", "optimizer=adam,muon", "seed=0,1", "steps=1", *[o for o in tiny if "steps=" not in o])
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("Comparison") :]
    summaries = [json.loads(p.read_text()) for p in (tmp_path / "outputs").glob("*/summary.json")]
    for name in ("adam", "muon"):
        losses = [summary["val/loss"] for summary in summaries if name in summary["run"]]
        (line,) = (line for line in table.splitlines() if f"│ {name} " in line)
        assert f"{sum(losses) / 2:.4f} ± " in line
        assert "2 runs" in line


def test_a_comparison_that_cannot_be_drawn_costs_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n')
    members = [{"status": 0, "folder": tmp_path / name, "report": ReportConfig()} for name in ("a", "b")]
    print_comparison([*members, {"status": 2}])
    captured = capsys.readouterr()
    assert captured.err.startswith(f"rsotrain: {tmp_path}/a/config.yaml cannot be read")
    assert captured.out == ""


@pytest.mark.slow
def test_submitit_members_hand_back_their_status(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    result = cli(
        "-m", *launcher, "optimizer.lr=-1,0.01,0.02", "steps=1", *[o for o in tiny if "steps=" not in o]
    )
    assert result.returncode == 2  # of the first; the others have run
    assert len(list((tmp_path / "outputs").glob("*/summary.json"))) == 2
    assert "Comparison" in result.stdout
    (log,) = (
        path
        for path in (tmp_path / "outputs/.submitit").glob("*/*_log.err")
        if "must not be negative" in path.read_text()
    )
    assert "Traceback" not in log.read_text()
