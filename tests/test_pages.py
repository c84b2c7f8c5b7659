"""The pages: their links lead somewhere, README is short, and its figures and commands are true."""

import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command import ROOT
from helpers.pages import anchors, broken, commands, links, pages
from helpers.runs import compose

from rsotrain.cli.flags import split_flags
from rsotrain.cli.overrides import check_overrides, normalise
from rsotrain.config.schema import Mode
from rsotrain.config.validation import validate
from rsotrain.errors import UserError
from rsotrain.report.runs import read_runs

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import memory_tables

README = ROOT / "README.md"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("")
    (tmp_path / "other.md").write_text("# One thing\n## Two: `things`\n# One thing\n```\n# none\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#two-things) ![c](picture.png) [d](#here) [e](https://x.org/#y)\n"
        '[f](other.md#one-thing-1) `[g](none.md)`\n```\n[h](none.md)\n```\n<img src="none.png">\n'
        "[i](other.md#none) [j](#there) [k](none/) [l](/etc/passwd)\n"
    )
    assert [sentence.partition(":")[0] for sentence in broken(page, tmp_path)] == [
        "none.png", "other.md#none", "#there", "none/", "/etc/passwd",
    ]  # fmt: skip
    assert anchors((tmp_path / "other.md").read_text()) == {"one-thing", "two-things", "one-thing-1"}


def test_readme_is_short_and_leads_to_every_page_of_a_folder() -> None:
    text = README.read_text()
    assert 900 <= len(text.split()) <= 1200
    reached, new = set(), {README}
    while new:
        page = new.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text())}
        new |= {path for path in targets if path.suffix == ".md"} - reached
    assert set(pages()) <= reached


def test_readmes_memory_is_that_of_the_tables() -> None:
    text, page = README.read_text(), memory_tables.PAGE.read_text()
    planned = {
        row.split("|")[1].strip(): row.split("|")[6].strip()  # the column of 7b
        for row in memory_tables.table_in(page, "one GPU")[2:]
    }
    eight = {
        row.split("|")[1].strip(): row.split("|")[6].strip()
        for row in memory_tables.table_in(page, "8 GPUs")[2:]
    }
    for method, cell in planned.items():
        assert f"| {method} | {cell} | {eight[method]} |" in text
    rso, adam = (float(planned[f"`{method}`"].split()[-1]) for method in ("rso", "adam"))
    assert f"RSO trains llama_7b in {rso:.1f} GiB, Adam in {adam:.1f}" in text


def test_readmes_plan_is_of_the_memory_that_it_names() -> None:
    """Its command has the settings of the tables, so that a reader sees README's numbers."""
    (line,) = (line for line in commands(README.read_text()) if "mode=plan" in line)
    given = [word for word in shlex.split(line)[1:] if word not in ("-m", "mode=plan")]
    for method in ("adam", "galore", "rso"):
        one = [f"optimizer={method}" if word.startswith("optimizer=") else word for word in given]
        assert f"optimizer={method}" in one
        shown, table = compose([*one, "steps=10000"]), memory_tables.run_of("7b", method, 1)
        assert replace(shown, micro_batch_size=1) == table


def test_a_report_of_a_fresh_clones_outputs_meets_no_run(tmp_path: Path) -> None:
    """What is committed in outputs/ is a page with pictures, and no run that a user's could be mixed with."""
    committed = {path.name for path in (ROOT / "outputs" / "study").iterdir()}
    assert "README.md" in committed
    shutil.copytree(ROOT / "outputs" / "study", tmp_path / "outputs" / "study")
    for named in ("outputs", "outputs/study"):
        with pytest.raises(UserError, match=r"holds no run|is not a run folder"):
            read_runs([tmp_path / named])


# --- commands ----------------------------------------------------------------------------------------

_STANDS_FOR = {
    "outputs/<run>": "a_run", "<folder>": "hub_folder", "my_model": "hub_folder", "…": "",
}  # fmt: skip
_OTHER_PROGRAMS = ("pip ", "sbatch ", "wandb ", "rsotrain-report ", "eval ", "python -m rsotrain.sweep_file ")
# Files that a reader has, and this test has not; a command with one of them is read as far as that.
_READERS_OWN = ("my_conf", "hub_folder", "--config-dir outputs/conf")


def _overrides(line: str) -> list[str] | None:
    """The overrides of a line that starts rsotrain, through whichever launcher; None for other programs."""
    if line.startswith(_OTHER_PROGRAMS):
        return None
    words = shlex.split(line)
    starts = [i for i, word in enumerate(words) if word == "rsotrain"]
    assert starts, f"no command of rsotrain's, and none that is known: {line}"
    return words[starts[0] + 1 :]


COMMANDS = [
    pytest.param(line, id=f"{page.parent.name if page != README else 'README'}: {line[:60]}")
    for page in pages()
    for line in commands(page.read_text())
    if line.startswith(("rsotrain", "torchrun", "srun")) and not line.startswith("rsotrain-report")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_a_page_composes(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is what rsotrain takes; of a sweep, its first. test_readme_walk.py runs README's."""
    monkeypatch.chdir(tmp_path)
    for shown, meant in _STANDS_FOR.items():
        line = line.replace(shown, meant)
    given = _overrides(line)
    assert given is not None
    flags, words = split_flags(given)
    overrides = normalise(words)
    check_overrides(overrides)
    if any(name in line for name in _READERS_OWN):
        return
    for name in ("corpus.jsonl", "held_out.parquet", "instructions.jsonl", "mine.jsonl"):
        (tmp_path / name).write_text("")
    for name in ("books", "a_run"):
        (tmp_path / name).mkdir()
    sweeps = "-m" in flags or "mode=tune" in overrides
    assert sweeps or not any(re.search(r"=[^'\"\[]*,", word) for word in overrides)
    mine = [re.sub(r"(=[^,\[{]*),.*", r"\1", o) for o in overrides if not o.startswith("hydra")]
    config = compose(mine)
    if config.mode in (Mode.train, Mode.plan) and config.parallelism.strategy.name == "single":
        validate(config)


def test_every_line_of_readmes_blocks_is_known() -> None:
    for line in commands(README.read_text()):
        _overrides(line)
