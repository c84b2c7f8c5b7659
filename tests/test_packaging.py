"""rsotrain installs from a wheel into an empty environment and from a checkout, and works anywhere."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.command import ROOT

FILES = ["rsotrain/conf/config.yaml", "rsotrain/data/corpus/train.json.gz", "rsotrain/data/corpus/README.md"]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean | {"COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built through the sdist as an installer of the sdist would."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_carries_conf_and_corpus_and_nothing_twice(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert set(FILES) <= set(names)
    groups = {p.relative_to(ROOT / "conf").as_posix() for p in (ROOT / "conf").rglob("*.*")}
    assert {n.removeprefix("rsotrain/conf/") for n in names if n.startswith("rsotrain/conf/")} == groups
    assert {n.split("/")[0] for n in names} == {"rsotrain", f"rsotrain-{wheel.name.split('-')[1]}.dist-info"}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path, tiny: list[str]) -> None:
    # The dependencies come from this environment through a path file, since installing torch again
    # takes minutes; a path file of a path file is not followed, so that the checkout stays invisible.
    environment = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path).returncode == 0
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "-q", "--no-deps"]
    installed = run(*pip, "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    python, command = environment / "bin/python", environment / "bin/rsotrain"
    where = run(python, "-c", "import rsotrain; print(rsotrain.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(site))
    assert "llama_60m" in run(command, "--help", cwd=tmp_path).stdout
    finished = run(command, *tiny, "steps=2", "run_name=r", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "outputs/r/summary.json").is_file()


def test_the_checkout_works_from_any_folder(tmp_path: Path, tiny: list[str]) -> None:
    command = Path(sysconfig.get_path("scripts")) / "rsotrain"
    if not command.exists():
        pytest.fail("install with pip install -e '.[test]' first")
    where = run(sys.executable, "-c", "import rsotrain; print(rsotrain.__file__)", cwd=tmp_path)
    assert where.stdout.strip() == str(ROOT / "rsotrain" / "__init__.py")
    finished = run(command, *tiny, "steps=2", "run_name=r", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "outputs/r/summary.json").is_file()
