"""A SLURM of this machine alone, for the tests of `make test-slurm`."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers.command import ROOT

SCRIPT = ROOT / "tests/tools/slurm_lab.sh"


@contextmanager
def slurm_lab(factory: pytest.TempPathFactory, nodes: int = 1) -> Iterator[dict[str, str]]:
    """The environment of those who submit."""
    lab = factory.mktemp("lab")
    lab.parent.chmod(0o755)  # munge runs as a user of its own and must get through
    lab.parent.parent.chmod(0o755)
    own = {"LAB": str(lab), "NODES": str(nodes)}
    subprocess.run(["bash", SCRIPT, "start"], env=os.environ | own, check=True, timeout=120)
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    try:
        yield os.environ | own | {"SLURM_CONF": f"{lab}/slurm.conf", "PYTHON": sys.executable, "PATH": path}
    finally:
        subprocess.run(["bash", SCRIPT, "stop"], env=os.environ | own, check=True, timeout=120)
