"""Writes the benchmark table of the README.md in this folder from what the scripts beside this one have left.

    python tests/benchmark/table.py [--run] [--write]

``--run`` runs them all first, an hour on two cores that should have nothing else to do; ``--write`` replaces
the table between the two marks on that page, else it is printed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from bench import RESULTS, ROOT, Figure

COMMANDS = {
    "throughput_llama_60m_bf16": "throughput_vs_huggingface.py",
    "mfu": "mfu.py",
    "optimizer_share": "optimizer_share.py",
    "compile_vs_eager": "compile_vs_eager.py",
    "startup": "startup.py",
    "data_rate": "data_rate.py rate",
    "memory_logging": "memory_logging.py",
    "growth": "growth.py",
}
BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"


def processor() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "galore-torch"))
    return f"{processor()}; {packages}, Python {platform.python_version()}"


def table() -> str:
    """Markdown: of each script its conditions, command and figures; those that share a bar share a row."""
    lines = [machine() + ". Written by `make benchmark`; bold: short of its bar.", ""]
    lines += ["| | bar | measured |", "|---|---|---|"]
    for name in COMMANDS:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            raise SystemExit(f"{file} is missing: python tests/benchmark/{COMMANDS[name]}")
        content = json.loads(file.read_text())
        if any("of" not in fields for fields in content["figures"]):
            raise SystemExit(f"{file} is of an older version: python tests/benchmark/{COMMANDS[name]}")
        lines.append(f"| *{content['conditions']}* | | `{content['command']}` |")
        rows: dict[tuple[str, str], list[str]] = {}
        for figure in (Figure(**fields) for fields in content["figures"]):
            bound = f"{'≥' if figure.at_least else '≤'} {figure.bar:g}{figure.unit}" if figure.bar else ""
            text = f"{figure.of} {figure.value:.3g}{figure.unit}"
            text = f"**{text}**" if figure.met is False else text
            rows.setdefault((figure.what, bound), []).append(text)
        lines += [f"| {what} | {bound} | {'; '.join(texts)} |" for (what, bound), texts in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.run:
        for command in COMMANDS.values():
            print(f"--- {command}", flush=True)
            script, *options = command.split()
            path = Path(__file__).with_name(script)
            subprocess.run([sys.executable, str(path), *options], check=True, cwd=ROOT)
    text = table()
    if not arguments.write:
        print(text)
        return
    page = Path(__file__).with_name("README.md")
    before, found, rest = page.read_text().partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"{page} has no {BEGIN} … {END}")
    page.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
