"""The worked examples of rsotrain/optim/README.md are run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import ROOT

PAGE = ROOT / "rsotrain" / "optim" / "README.md"
PROGRAM = """
import sys, types
from rsotrain.config import methods
exec(open("settings.py").read(), vars(methods))
module = types.ModuleType("rsotrain.optim.signum")
sys.modules[module.__name__] = module
exec(compile(open("code.py").read(), "signum.py", "exec"), vars(module))
from rsotrain.cli.entry import main
main()
"""


def blocks() -> dict[str, str]:
    return dict(re.findall(r"^```\w+ (\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signum")
    parts = blocks()
    assert {"trainer", "settings", "code", "conf"} <= set(parts)
    for name in ("settings", "code"):
        (folder / f"{name}.py").write_text(parts[name])
    (folder / "mine/optimizer").mkdir(parents=True)
    (folder / "mine/optimizer/signum.yaml").write_text(parts["conf"])
    return folder


def call(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-c", PROGRAM, "--config-dir", "mine", "optimizer=signum", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_and_resumes_bitwise(folder: Path, tiny: list[str]) -> None:
    straight = call(
        folder, *tiny, "run_name=straight", "keep_checkpoints=9", "optimizer.state_dtype=bfloat16"
    )
    assert "signum" in straight
    runs = folder / "outputs"
    (runs / "again/checkpoints").mkdir(parents=True)
    files = ("model.safetensors", "optimizer.safetensors")
    for item in ("config.yaml", "metrics.jsonl", "tokenizer", "run.json", "checkpoints/step_00000004"):
        subprocess.run(["cp", "-r", runs / "straight" / item, runs / "again" / item], check=True)
    call(folder, *tiny, "run_name=again", "keep_checkpoints=9", "optimizer.state_dtype=bfloat16")
    assert "resumed from" in (runs / "again/train.log").read_text()
    for file in files:
        last = f"checkpoints/step_00000006/{file}"
        assert (runs / "again" / last).read_bytes() == (runs / "straight" / last).read_bytes()


@pytest.mark.slow
def test_its_plan_is_its_formula(folder: Path) -> None:
    shown = call(folder, "mode=plan", "model=llama_tiny", "device=cpu", "logger=jsonl")
    assert "signum" in shown
    assert "differs" not in shown


def test_its_program_with_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()["trainer"], "trainer.py", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "foam/checkpoint-4/optimizer.pt").is_file()
    assert (tmp_path / "optimizer.pt").is_file()
