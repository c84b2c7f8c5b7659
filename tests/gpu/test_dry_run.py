"""The checks for GPUs are walked on the CPU with a few methods, and their report is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import ROOT
from helpers.gpu_settings import DRY_RUN


@pytest.mark.slow
def test_the_checks_run_and_are_reported(tmp_path: Path) -> None:
    command = [sys.executable, "tests/tools/gpu_report.py", "--dry-run", "quick", "--folder", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != DRY_RUN}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["machine"]["dry_run"]
    others = [check["name"] for check in report["checks"] if check["outcome"] != "passed"]
    assert others == ["compiled is eager[NOTSET]"]  # which only the whole dry run has
    measured = {check["name"].partition("[")[0]: check["measured"] for check in report["checks"]}
    assert measured["float32 is the cpus"]["loss"] == 0
    assert measured["a checkpoint goes on"]["bitwise"]
    assert measured["speed"]["tokens/s"] > 0
    page = (tmp_path / "gpu_report.md").read_text()
    assert "a dry run on the CPU" in page
    assert page.count("| passed |") == len(report["checks"]) - 1
