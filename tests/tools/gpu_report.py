"""Run the checks of tests/gpu and write what they measured: python tests/tools/gpu_report.py

    --several            those for several GPUs instead of those for one
    --dry-run [quick]    on the CPU, with small models; what happens without a GPU in any case
    --folder FOLDER      for gpu_report.json and gpu_report.md (gpus_report with --several); outputs/gpu

Nothing is installed: it takes the torch, and the other packages, of the Python that runs it. Options after --
are pytest's.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
NEEDED = (
    "torch",
    "pytest",
    "hydra",
    "omegaconf",
    "rich",
    "numpy",
    "safetensors",
    "datasets",
    "sentencepiece",
)


@dataclass
class Check:
    """``reason``: why it failed or was skipped, in a line."""

    name: str
    outcome: str
    seconds: float
    reason: str = ""
    measured: dict[str, Any] = field(default_factory=dict)


class Collector:
    """A plugin of pytest that keeps what each check recorded."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        if report.when == "teardown":
            return
        reason = ""
        if report.skipped:
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            reason = (report.longreprtext.strip().splitlines() or [""])[-1]
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        self.checks.append(Check(name, report.outcome, report.duration, reason, dict(report.user_properties)))


def machine(dry: bool) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "dry_run": dry}
    if not dry:
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        }
    return found


def page(report: dict[str, Any]) -> str:
    """The report in Markdown: what it ran on, a line for each check, what failed first."""
    here = report["machine"]
    where = "a dry run on the CPU: it shows that the checks run, and nothing about GPUs"
    if not here["dry_run"]:
        where = f"{here['gpus']} × {here['gpu']}, CUDA {here['cuda']}"
    counts = {o: sum(c["outcome"] == o for c in report["checks"]) for o in ("passed", "failed", "skipped")}
    lines = [
        "# GPU report", "",
        f"{where}; torch {here['torch']}, Python {here['python']}. {report['seconds']:.0f} seconds:"
        f" {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped.", "",
        "| check | | measured |", "|---|---|---|",
    ]  # fmt: skip
    order = {"failed": 0, "skipped": 1, "passed": 2}
    for check in sorted(report["checks"], key=lambda c: order[c["outcome"]]):
        measured = ", ".join(f"{k} {_short(v)}" for k, v in check["measured"].items())
        said = "; ".join(text for text in (check["reason"], measured) if text).replace("|", "\\|")
        lines.append(f"| {check['name']} | {check['outcome']} | {said} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def main() -> int:
    arguments, others = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, others = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--several", action="store_true")
    parser.add_argument("--dry-run", nargs="?", const="1", choices=("1", "quick"))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "gpu")
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{sys.executable} lacks {', '.join(missing)}: name a Python that has them with PYTHON=…")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    import pytest
    import torch

    needed = 2 if options.several else 1
    if options.dry_run is None and torch.cuda.device_count() < needed:
        print("too few CUDA devices: a dry run on the CPU", flush=True)
        options.dry_run = "1"
    if options.dry_run:
        os.environ["RSOTRAIN_GPU_DRY_RUN"] = options.dry_run
    collector, begin = Collector(), time.monotonic()
    tests = "test_several_gpus.py" if options.several else "test_one_gpu.py"
    given = ["-p", "no:cacheprovider", str(ROOT / "tests" / "gpu" / tests), "--rootdir", str(ROOT), *others]
    status = pytest.main(given, plugins=[collector])
    report = {
        "machine": machine(options.dry_run is not None),
        "seconds": time.monotonic() - begin,
        "checks": [asdict(check) for check in collector.checks],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    name = "gpus_report" if options.several else "gpu_report"
    for suffix, text in (("json", json.dumps(report, indent=1)), ("md", page(report))):
        (options.folder / f"{name}.{suffix}").write_text(text)
        print(options.folder / f"{name}.{suffix}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
