"""The command line guesses right: other tools' names, what a mode reads, which run it is and where."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import Cli, call_main

from rsotrain.cli import entry as command_line
from rsotrain.cli.hints import other_tools_name
from rsotrain.config.keys import field_types, known_keys
from rsotrain.config.schema import SCHEMAS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lr=0.1"], "unknown key lr; it is called optimizer.lr here"),
        (["learning_rate=0.1"], "unknown key learning_rate; it is called optimizer.lr here"),
        (["optimizer.learning_rate=0.1"], "optimizer.learning_rate; it is called optimizer.lr here"),
        (["gradient_accumulation_steps=4"], "micro_batch_size what a process takes at once"),
        (["max_steps=3"], "unknown key max_steps; it is called steps here"),
        (["resume=true"], "unknown key resume; the same command resumes by itself"),
        (["lr_scheduler.warmup=4"], "it is called lr_scheduler.warmup_steps here"),
        (
            ["wandb=false"],
            "unknown key wandb; logger=wandb is Weights & Biases, and logger=jsonl leaves it out",
        ),
        (["gpus=4"], "torchrun --nproc_per_node 4 -m rsotrain"),
        (["--steps", "100"], "--steps is no flag: settings are written as key=value; say steps=…"),
        (
            ["--learning-rate=3"],
            "--learning-rate is no flag: settings are written as key=value; it is called",
        ),
        (["--foo"], "unrecognized arguments: --foo"),
        (["optimizer=adam,galore"], "optimizer=adam,galore is several runs; start them with rsotrain -m …"),
        (["--shell-completion"], "--shell-completion needs to know what to do; eval"),
        (
            ["mode=benchmrak"],
            "mode=benchmrak does not exist; did you mean benchmark? (there are: train, plan,",
        ),
        (["optimizer.on_refresh=keeep"], "did you mean keep? (there are: keep, reset, transport)"),
        (["sampler.solver=gramm"], "did you mean gram? (there are: gram, full)"),
        (["optimizer.rank=abc"], "optimizer.rank=abc must be a number"),
        (["micro_batch_size=x"], "micro_batch_size=x must be a whole number or null"),
        (["steps=null"], "steps=null must be a whole number"),
        (["compile=maybe"], "compile=maybe must be true or false"),
        (["optimizer.betas=0.9"], "optimizer.betas must be a list, as optimizer.betas=[…]"),
        (["optimizer.betas=[0.9,b]"], "optimizer.betas[1]=b must be a number"),
        (["evaluation=3"], "evaluation has keys of its own, which rsotrain --help lists"),
        (["train"], "'train' is not of the form key=value; say mode=train"),
        (["help"], "'help' is not of the form key=value; rsotrain --help lists all keys"),
        (["benchmark.steps=3"], "benchmark.steps is for mode=benchmark; leave it out of mode=train"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_other_tools_call_it(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call_main(command_line, arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("rsotrain: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "key", "owner", "hint"),
    [
        (
            ["data=files", "data.validation_split=x"],
            "data.validation_split",
            "data=hub has it",
            "data.validation_path, data.validation_fraction",
        ),
        (["data.train_split=x"], "data.train_split", "data=hub has it", None),
        (
            ["optimizer=adam", "optimizer.rank=3"],
            "optimizer.rank",
            "optimizer=galore, sn_sm, fira, … have it",
            None,
        ),
        (["optimizer=adam", "+optimizer.rank=3"], "optimizer.rank", "optimizer=galore", None),  # once ignored
        (["optimizer=adam", "optimizer.rnak=3"], "optimizer.rnak", None, None),
        (["optimizer=galore", "optimizer.rnak=3"], "optimizer.rnak", None, "optimizer.rank"),
        (["evalation.samples=3"], "evalation", None, "evaluation.…"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_hint_names_only_keys_of_the_chosen_options(
    arguments: list[str], key: str, owner: str | None, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(command_line, arguments) == 2
    said = capsys.readouterr().err
    group = key.partition(".")[0]
    option = next((a.partition("=")[2] for a in arguments if a.startswith(f"{group}=")), "embedded")
    has = f"{group}={option} has no key {key} ({owner}" if owner else f"unknown key {key}"
    assert has in said
    hinted = re.search(r"did you mean (.+)\?", said)
    assert (hinted and hinted[1]) == hint
    if hint is not None and group in SCHEMAS:
        allowed = {f"{group}.{name}" for name in SCHEMAS[group][option].__dataclass_fields__}
        assert set(hint.split(", ")) <= allowed


def test_no_name_of_another_tool_hides_a_key_of_ours() -> None:
    """A hint that says "it is called x here" must name a key, and never for a key that there is."""
    for key in field_types():
        meant = other_tools_name(key, known_keys())
        assert not meant or key not in known_keys() or "." not in key or meant.split()[3] != key


def test_version_and_completion(cli: Cli) -> None:
    assert re.fullmatch(r"rsotrain \d+\.\d+\.\d+\n", cli("--version").stdout)
    completion = cli("--shell-completion", "install=bash")
    assert (completion.returncode, completion.stderr) == (0, "")
    assert "complete" in completion.stdout


def test_help_fits_a_terminal_of_80_columns(cli: Cli) -> None:
    lines = cli("optimizer=adam", "--help", COLUMNS="80").stdout.splitlines()
    assert len(lines) > 100
    wide = [line for line in lines if len(line) > 80]
    assert all(re.fullmatch(r"  [\w.]+=\S+", line) for line in wide)  # a value cannot be broken


def test_a_pipe_that_nobody_reads_ends_help_without_a_word() -> None:
    command = [sys.executable, "-u", "-m", "rsotrain", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


# --- runs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_says_its_name_folder_and_device_and_its_paths_can_be_copied(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    long = "a_name_that_is_much_longer_than_a_line_of_a_terminal_which_used_to_be_cut_into_pieces_by_a_table"
    result = cli(*tiny, "optimizer=adam", f"run_name={long}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"run {long} on the CPU (")
    assert lines[0].endswith("), precision=fp32")
    assert lines[1] == f"its folder: outputs/{long}"
    assert f"run folder: outputs/{long}" in lines
    checkpoint = next(line for line in lines if line.startswith("checkpoint: ")).partition(": ")[2]
    assert (tmp_path / checkpoint / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_multirun_says_which_run_begins_and_its_table_keeps_state_and_memory(
    cli: Cli, tiny: list[str]
) -> None:
    result = cli("-m", "optimizer=adam,galore", "seed=0,1", *tiny, COLUMNS="80")
    assert result.returncode == 0, result.stderr
    said = re.findall(r"^run \d of .*$", result.stdout, re.MULTILINE)
    assert said == [
        "run 1 of 4: optimizer=adam seed=0", "run 2 of 4: optimizer=adam seed=1",
        "run 3 of 4: optimizer=galore seed=0", "run 4 of 4: optimizer=galore seed=1",
    ]  # fmt: skip
    table = result.stdout[result.stdout.index("Comparison") :]
    assert "state" in table
    assert "memory" in table
    assert "±" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
def test_a_plan_leaves_nothing_that_looks_like_a_run(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    assert cli("mode=plan", *tiny, "run_name=r").returncode == 0
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == ["plans"]
    assert sorted(p.name for p in (tmp_path / "outputs/plans").iterdir()) == ["r.json", "r.png"]


@pytest.mark.slow
def test_evaluation_reads_a_file_as_it_is_and_refuses_what_it_would_not_read(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    assert cli(*tiny, "run_name=r").returncode == 0
    (tmp_path / "mine.jsonl").write_text(
        '{"text": "There was a king who had a daughter, and she ..."}\n' * 60
    )
    of_it = ["mode=evaluate", "checkpoint.path=outputs/r"]
    mine = cli(*of_it, "data=files", "data.path=mine.jsonl", "seq_len=32")
    assert mine.returncode == 0, mine.stderr
    (record,) = (
        json.loads(line) for line in (tmp_path / "outputs/r/evaluations.jsonl").read_text().splitlines()
    )
    assert record["tokens"] > 300  # all of the file, not a part that was set aside
    for ignored in ("model=llama_60m", "optimizer.lr=1", "tokenizer.vocab_size=2000", "steps=4", "seed=1"):
        refused = cli(*of_it, ignored)
        assert refused.returncode == 2
        key = ignored.partition("=")[0]
        assert f"from checkpoint.path, so {key} would do nothing; leave it out" in refused.stderr
    assert (
        cli("mode=generate", "checkpoint.path=outputs/r", "seed=1", "generate.max_new_tokens=2").returncode
        == 0
    )


@pytest.mark.slow
def test_what_weights_do_not_depend_on_may_change_in_a_runs_own_folder(
    cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    own = [o for o in tiny if not o.startswith(("eval_every", "steps"))]
    straight = cli(*own, "steps=6", "run_name=straight", "eval_every=3")
    assert straight.returncode == 0, straight.stderr
    assert cli(*own, "steps=6", "run_name=r", "eval_every=3", "max_seconds=0.001").returncode == 75
    changed = ["eval_every=2", "evaluation.max_tokens=300", "activation_checkpointing=block"]
    again = cli(*own, "steps=6", "run_name=r", *changed)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    file = "checkpoints/step_00000006/model.safetensors"
    one, other = ((tmp_path / "outputs" / name / file).read_bytes() for name in ("straight", "r"))
    assert one == other
    refused = cli(*own, "steps=9", "run_name=r", "eval_every=3")
    assert refused.returncode == 2
    assert "holds a run with steps=6" in refused.stderr
    assert "another run_name and checkpoint.path=outputs/r" in refused.stderr
    longer = cli(*own, "steps=9", "run_name=longer", "checkpoint.path=outputs/r")  # as it says
    assert longer.returncode == 0, longer.stderr
    assert json.loads((tmp_path / "outputs/longer/summary.json").read_text())["step"] == 9


def test_under_torchrun_the_sentence_is_in_torchruns_own_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert call_main(command_line, ["steps=-1"]) == 2
    assert capsys.readouterr().err == "rsotrain: steps=-1 must be positive\n"
    report = str(ChildFailedError("rsotrain", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert report.strip().splitlines()[-2].endswith("rsotrain: steps=-1 must be positive")
