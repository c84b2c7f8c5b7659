"""One sentence where Hydra has a traceback, or nothing to say: flags, keys, names, processes."""

import json
import sys
from pathlib import Path

import pytest
from helpers.command import Cli, call_main

from rsotrain.cli.flags import split_flags
from rsotrain.cli.overrides import check_overrides
from rsotrain.errors import UserError
from rsotrain.tracking.escaping import one_line

LONG = "a" * 300


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one sentence that ``arguments`` get, without a line of output beside it."""
    from rsotrain.cli import entry as cli

    monkeypatch.setenv("COLUMNS", "200")
    assert call_main(cli, arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rsotrain: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *(
            ([key], f"'{key}' is not of the form key=value")
            for key in ("=1", "+=1", "@=1", "~", "", "1=1", "é=1")
        ),
        (["--foo"], "unrecognized arguments: --foo; rsotrain --hydra-help lists the flags"),
        (["-x"], "unrecognized arguments: -x"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
        (["--cfg", "nope"], "argument --cfg/-c: invalid choice: 'nope'"),
        (["--help=3"], "ignored explicit argument '3'"),
        (["--resolve"], "--resolve has no effect without --cfg job"),
        (["--package=model"], "--package has no effect without --cfg job"),
        (["--experimental-rerun", "x"], "--experimental-rerun would unpickle a file"),
        (
            ["--shell-completion"],
            '--shell-completion needs to know what to do; eval "$(rsotrain --shell-completion install=bash)"',
        ),
        (["--run", "-m"], "Only one of --run, --multirun"),
        (["--config-dir", "nowhere"], "nowhere' not found"),
        (["hydra/launcher=null"], "hydra/launcher=null chooses no option; leave it out"),
        (["-m", "hydra/sweeper=None", "seed=0,1"], "hydra/sweeper=null chooses no option"),
        (["hydra/job_logging=1"], "hydra/job_logging=1 chooses no option"),
        (["hydra=null"], "hydra=null is for none of Hydra's settings"),
        (["hydra.run.dir=/etc/passwd/x"], "hydra.run.dir: /etc/passwd/x cannot be written: Not a directory"),
        (["-m", "hydra.sweep.dir=/etc/passwd/x", "seed=0,1"], "hydra.sweep.dir: /etc/passwd/x cannot be"),
        (["-m", "output_dir=/etc/passwd/x", "seed=0,1"], "output_dir: /etc/passwd/x cannot be written"),
        (["hydra.searchpath=[nope://x]"], "No config source registered for schema nope"),
        (["-m", "hydra.sweeper.max_batch_size=0", "seed=0,1"], "this command line (AssertionError)"),
        (["-m", "seed=range(0,10000000000)"], "a sweep over more than 100_000 runs"),
        (["-m", f"seed={','.join(map(str, range(400)))}", f"steps={','.join(map(str, range(400)))}"], "[…]"),
        (["optimizer.betas.x=1"], "unknown key optimizer.betas.x; optimizer.betas has no parts of a name"),
        (["steps.x=1"], "unknown key steps.x"),
        (["model={}"], "model={} sets nothing; leave it out"),
        (["compile=7"], "compile=7 must be true or false"),
        (["logger.wandb=-1"], "logger.wandb=-1 must be true or false"),
        ([f"foo.{'b' * 3000}=1"], "unknown key foo.bbb"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_flags_and_hydras_own_settings(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(arguments, capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([f"run_name={LONG}"], "has 300 bytes, but the name of a folder at most 255; shorten it"),
        ([f"run_name={'é' * 150}"], "has 300 bytes"),
        ([f"output_dir={LONG}/x"], "has a name of 300 bytes in it, but a file's may have 255"),
        ([f"output_dir={'x/' * 2000}"], "has 4000 bytes, but may have 3500; shorten it"),
        ([f"cache_dir={LONG}"], "cache_dir=aaa"),
        ([f"report.path={LONG}"], "report.path=aaa"),
        ([f"checkpoint.path={LONG}"], "checkpoint.path=aaa"),
        (["data=files", f"data.path={LONG}", "data.validation_fraction=0.1"], "data.path=aaa"),
        (["tokenizer=sentencepiece", f"tokenizer.path={LONG}"], "tokenizer.path=aaa"),
        (["model=pretrained", f"model.init_from={LONG}"], "model.init_from=aaa"),
        ([f"model.name={'m' * 240}"], "would have a name of"),
        *(
            ([f"{group}.name={name}"], f"{group}.name={name} must be the name of one folder, without a slash")
            for group in ("model", "optimizer", "sampler")
            for name in ("../../x", "/x", "..", "")
        ),
        (["run_name='  '"], "must be the name of one folder"),
        (["run_name=a\nb"], r"run_name=a\nb contains a control character"),
        (["run_name=\x1b[2J"], r"\x1b[2J"),
        (["run_name='a\0b'"], r"run_name=a\x00b contains a NUL character"),
        (["data.name='\0'"], r"data.name=\x00 contains a NUL character"),
        (["generate.prompts=['a\0']"], "generate.prompts=a"),
        (["run_name=\udcff"], r"run_name=\udcff is not valid UTF-8"),
        (["logger.wandb_group=\udcff"], r"logger.wandb_group=\udcff is not valid UTF-8"),
        (["output_dir=~nobodyhere/x"], "output_dir=~nobodyhere/x: there is no home folder of this name"),
        (["output_dir="], "output_dir is empty; give a path, or ."),
        (["checkpoint.path="], "checkpoint.path is empty"),
        (["output_dir=/etc/passwd/x"], "/etc/passwd is not a folder"),
        (["cache_dir=/etc/passwd/x"], "cache_dir=/etc/passwd/x: /etc/passwd is not a folder"),
        (["model=pretrained", "model.init_from=/n/a"], "rsotrain: model.init_from=/n/a: /n/a/config.json"),
        (
            ["data=instructions", "data.path=x", "data.validation_fraction=0.1", "data.response_field=input",
             "data.prompt_template='{input}'"],
            "data.response_field=input is a field of data.prompt_template, too",
        ),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_names_that_no_file_has(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = refused(arguments, capsys, monkeypatch)
    assert sentence in said
    assert len(said) < 1600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc in the environment must be a whole number; unset it"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= in the environment must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be positive"),
        ({"RANK": "one"}, "RANK=one in the environment must be a whole number"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5 in the environment must be a whole number"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x in the environment must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 must lie between 0 and 1, for WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 must lie between 1 and"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 must lie"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 says that there are several processes, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999 must lie between 1 and 65535",
        ),
        ({"WANDB_RUN_ID": "../x"}, "WANDB_RUN_ID=../x must be the name of one folder"),
        ({"RSOTRAIN_CACHE_DIR": "/etc/passwd"}, "RSOTRAIN_CACHE_DIR=/etc/passwd: /etc/passwd is not"),
        ({"RSOTRAIN_CACHE_DIR": "~nobodyhere"}, "RSOTRAIN_CACHE_DIR=~nobodyhere: there is no home folder"),
    ],
    ids=str,
)  # fmt: skip
def test_an_environment_that_makes_no_sense(
    environment: dict[str, str], sentence: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = refused([f"output_dir={tmp_path}/out", "parallelism=fsdp"], capsys, monkeypatch)
    assert sentence in said
    assert list(tmp_path.iterdir()) == []


def test_one_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from rsotrain.config.processes import Processes, check_rendezvous, processes

    assert processes({}) == processes({"RANK": "3"}) == Processes()
    given = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert processes(given) == Processes(size=4, rank=3, local_size=2, local_rank=1)
    check_rendezvous(given | {"MASTER_ADDR": "node", "MASTER_PORT": "29500"})


@pytest.mark.slow
def test_a_pretrained_model_that_is_out_of_range_is_named_by_its_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 4, "max_position_embeddings": 32, "vocab_size": 300, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    for change, sentence in (
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not split into"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must be at most 10_000"),
        ({"hidden_size": "64"}, "hidden_size=64, but it must be a positive number"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(sizes | change))
        arguments = ["model=pretrained", f"model.init_from={tmp_path}", f"output_dir={tmp_path}/out"]
        said = refused(arguments, capsys, monkeypatch)
        assert said.startswith(f"rsotrain: model.init_from={tmp_path}: ")
        assert sentence in said
    assert not (tmp_path / "out").exists()


def test_flags_and_overrides_in_any_order() -> None:
    assert split_flags(["a=1", "--config-dir", "mine", "b=2", "-m", "c=3,4"]) == (
        ["--config-dir", "mine", "-m"], ["a=1", "b=2", "c=3,4"],
    )  # fmt: skip
    assert split_flags(["a=1", "--info"]) == (["--info=all"], ["a=1"])
    assert split_flags(["--info", "defaults", "a=1"]) == (["--info", "defaults"], ["a=1"])
    assert split_flags(["-c", "job", "--package", "model", "a=1"])[1] == ["a=1"]


@pytest.mark.slow
def test_hydras_useful_flags_go_on_working(cli: Cli) -> None:
    for arguments, shown in (
        (["steps=3", "--info", "searchpath"], "conf"),
        (["seed=1", "--cfg", "job", "--package", "generate", "generate.top_k=7"], "top_k: 7"),
        (["-sc", "install=bash"], "complete"),
        (["--hydra-help"], "--multirun"),
    ):
        result = cli(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert shown in result.stdout


def test_what_makes_sense_passes() -> None:
    check_overrides([
        "steps=1", "~tuned", "+experiment=study", "++seed=1", "hydra/launcher=basic", "hydra.job.name=x",
        "optimizer.betas.0=0.8", "compile=true,false", "compile=1", "seed=range(1,100)", "model@x=llama_9m",
        "optimizer.betas=[0.9,0.99]",
    ])  # fmt: skip
    with pytest.raises(UserError, match="more than 100_000 runs"):
        check_overrides(["seed=range(1,1000)", "steps=range(1,1000)"])


def test_a_sentence_is_one_line_of_a_bearable_length() -> None:
    assert one_line("a/b c=1 must be é") == "a/b c=1 must be é"
    assert one_line("a\nb\x1b\x85\udcff\0") == r"a\nb\x1b\x85\udcff\x00"
    word = one_line(f"run_name={'a' * 3000} must be b")
    assert word.startswith("run_name=aaa")
    assert word.endswith("aaa must be b")
    assert len(word) < 330
    sentence = one_line(f"run_name={'a b ' * 3000} must be b")
    assert sentence.startswith("run_name=a b ")
    assert sentence.endswith(" must be b")
    assert len(sentence) < 1510
    path = f"/home/{'a' * 60}/{'b' * 60}/{'c' * 60}/{'d' * 60}"
    assert path in one_line(f"{path} is not a folder")


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Hydra and its parsers raise is the user's mistake."""
    from rsotrain.cli import entry as cli

    def broken(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("rsotrain.cli.compose.validate", broken)
    monkeypatch.setattr(sys, "argv", ["rsotrain", "steps=1"])
    with pytest.raises(KeyError, match="ours"):
        cli.main()
