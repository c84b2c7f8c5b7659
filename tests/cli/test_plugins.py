"""An optimizer of the user's own, in a folder given by ``--config-dir``: that of the page, and mistakes."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import ROOT, Cli, call_main

from rsotrain import plugged
from rsotrain.cli import entry
from rsotrain.cli.plugins import load_plugins
from rsotrain.config.methods import OPTIMIZERS

PAGE = ROOT / "rsotrain" / "optim" / "README.md"
BLOCKS = dict(re.findall(r"^```\w+ (plugged\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
CODE, CONF = BLOCKS["plugged"], BLOCKS["plugged_conf"]


@pytest.fixture(autouse=True)
def _unplugged() -> Iterator[None]:
    before = dict(OPTIMIZERS)
    yield
    load_plugins(None)
    assert before == OPTIMIZERS
    assert plugged.FOLDER not in os.environ


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``mine`` of the page, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "optimizer"
    folder.mkdir(parents=True)
    (folder / "softsign.py").write_text(CODE)
    (folder / "softsign.yaml").write_text(CONF)
    return folder


def call(*arguments: str) -> int:
    return call_main(entry, ["--config-dir", "mine", *arguments])


@pytest.mark.slow
def test_the_pages_method_trains_and_resumes_bitwise(mine: Path, tiny: list[str]) -> None:
    own = ["optimizer=softsign", *tiny, "keep_checkpoints=9"]
    assert call(*own, "run_name=straight") == 0
    straight, again = Path("outputs/straight"), Path("outputs/again")
    assert "name: softsign" in (straight / "config.yaml").read_text()
    shutil.copytree(straight, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints/step_00000006")
    assert call(*own, "run_name=again") == 0
    assert "resumed from" in (again / "train.log").read_text()
    for file in ("model.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/step_00000006/{file}"
        assert (again / last).read_bytes() == (straight / last).read_bytes()


PLAN = ["mode=plan", "model=llama_tiny", "device=cpu", "logger=jsonl", "optimizer=softsign"]


@pytest.mark.slow
def test_its_plan_is_its_formula(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*PLAN, "parallelism=fsdp", "parallelism.world_size=4") == 0
    shown = capsys.readouterr().out
    assert "by its formula" in shown
    assert "warning" not in shown


@pytest.mark.long
def test_a_method_may_have_no_formula(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = CODE.replace("(FullRankOptimizer)", "(Base)").replace(
        "class SoftSign(",
        "class Base(FullRankOptimizer):\n"
        "    matrix_state = classmethod(ParamGroupOptimizer.matrix_state.__func__)\n\n\nclass SoftSign(",
    )
    (mine / "softsign.py").write_text(
        without.replace(
            "from rsotrain.optim.full",
            "from rsotrain.optim.base import ParamGroupOptimizer\nfrom rsotrain.optim.full",
        )
    )
    assert call(*PLAN) == 0
    assert "by its formula" not in capsys.readouterr().out


@pytest.mark.slow
def test_its_settings_are_typed_and_explained(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("optimizer=softsign", "--help") == 0
    shown = capsys.readouterr().out
    assert "softsign" in shown.partition("Keys")[0]
    assert re.search(r"optimizer\.softness=0\.001 +size at which an update is half a sign", shown)
    for given, sentence in {
        "optimizer.softness=2": "optimizer.softness=2.0 must lie in (0, 1]",
        "optimizer.softness=big": "optimizer.softness=big must be a number",
        "optimizer.softnes=0.1": "unknown key optimizer.softnes; did you mean optimizer.softness?",
        "sampler=svd": "optimizer=softsign has no subspace",
    }.items():
        assert call("optimizer=softsign", "logger=jsonl", given) == 2
        assert sentence in capsys.readouterr().err


LAUNCHER = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], pytest.param(LAUNCHER, marks=pytest.mark.long)])
def test_a_sweep_compares_it_with_ours(mine: Path, cli: Cli, tiny: list[str], more: list[str]) -> None:
    result = cli("--config-dir", "mine", "-m", "optimizer=adam,softsign", *tiny, "steps=2", *more)
    assert result.returncode == 0, result.stderr
    assert re.search(r"Comparison(.|\n)*softsign", result.stdout)


@pytest.mark.alone
@pytest.mark.long
@pytest.mark.timeout(300)
def test_several_processes_train_it(mine: Path, tiny: list[str]) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rsotrain",
        "--config-dir", "mine", "optimizer=softsign", *tiny, "steps=2", "parallelism=fsdp", "run_name=two",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert "softsign" in Path("outputs/two/config.yaml").read_text()


WITHOUT_CLASS = CODE.partition("class SoftSign(")[0].replace('"SoftSign"', '"Nothing"')
MISTAKES: dict[str, tuple[str | None, str | None, str]] = {
    "no registration": (
        CODE.replace('@optimizer("softsign", "SoftSign")\n', ""), CONF,
        'softsign.py registers no optimizer; write @optimizer("softsign", "…"),',
    ),
    "one of ours": (
        CODE.replace('@optimizer("softsign"', '@optimizer("lion"'), CONF,
        "softsign.py: SoftSignConfig is registered as lion, as LionConfig of rsotrain.config.methods is",
    ),
    "an error": (CODE + "\n1 / 0\n", CONF, f"line {CODE.count(chr(10)) + 2}: ZeroDivisionError: division by"),
    "no Python": (CODE + "\nclass:\n", CONF, f"line {CODE.count(chr(10)) + 2}: SyntaxError: invalid syntax"),
    "another import": ("import nowhere\n", CONF, "line 1: ModuleNotFoundError: No module named 'nowhere'"),
    "no Python file": (
        None, CONF,
        "names the schema softsign, which nothing in rsotrain/config/methods.py registers, and no"
        " optimizer/softsign.py beside it",
    ),
    "no YAML file": (CODE, None, "softsign.py has no softsign.yaml beside it"),
    "no class": (WITHOUT_CLASS, CONF, "@optimizer names Nothing as the code of softsign, which is no class"),
    "no update": (
        CODE.replace("def negative_update", "def other"), CONF, "SoftSign does not define negative_update",
    ),
    "no dataclass": (CODE.replace("@dataclass\n", ""), CONF, "must be a @dataclass that derives from"),
    "a type that is text": (
        CODE.replace('momentum."""', 'momentum."""\nfrom __future__ import annotations', 1), CONF,
        "as `from __future__ import annotations` makes it; leave that line out",
    ),
    "a type of no YAML": (
        CODE.replace("softness: float = means(", "softness: complex = means("), CONF,
        "softsign.py: SoftSignConfig: ",
    ),
    "another schema": (
        CODE, CONF.replace("optimizer/softsign@", "optimizer/lion@"),
        "softsign.yaml names no schema of softsign.py; begin its defaults with /schema/optimizer/softsign@",
    ),
    "another name": (
        CODE, CONF.replace("name: softsign", "name: lion"), "sets optimizer.name=lion; set softsign",
    ),
    "state outside of a checkpoint": (
        CODE.replace("return -m", "self.n = getattr(self, 'n', 0) + 1\n        return -self.n * m"), CONF,
        "does not go on from a checkpoint as without one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, mine: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, conf, sentence = MISTAKES[mistake]
    for name, text in (("softsign.py", code), ("softsign.yaml", conf)):
        (mine / name).unlink()
        if text is not None:
            (mine / name).write_text(text)
    assert call("optimizer=softsign", *tiny) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not Path("outputs").exists()


def test_a_file_that_would_be_hidden_by_ours_is_refused(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "adam.yaml").write_text(CONF)
    assert call("optimizer=adam") == 2
    assert (
        "adam.yaml would never be read, since rsotrain has a file optimizer/adam.yaml"
        in capsys.readouterr().err
    )
    (mine / "adam.yaml").unlink()
    (mine / "soft-sign.py").write_text(CODE)
    assert call("optimizer=adam") == 2
    assert "soft-sign.py cannot be imported under that name" in capsys.readouterr().err


def test_files_with_an_underscore_are_for_the_others(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, _, tail = CODE.partition("class SoftSign(")
    (mine / "_shared.py").write_text("def divided(a, b):\n    return a / b\n")
    (mine / "softsign.py").write_text(
        f"{head}from ._shared import divided\n\n\nclass SoftSign({tail}".replace(
            "-momentum / (momentum.abs() + self.config.softness)",
            "divided(-momentum, momentum.abs() + self.config.softness)",
        )
    )
    assert call("optimizer=softsign", "--cfg", "job") == 0
    assert "softsign" in capsys.readouterr().out
