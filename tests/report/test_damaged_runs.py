"""A damaged or hostile file in a run folder costs one sentence, or that run; never a traceback or a hang."""

import json
import math
import os
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.report_harness import Make, call

from rsotrain.cli.multirun import compare_members
from rsotrain.config.schema import ReportConfig
from rsotrain.errors import UserError
from rsotrain.report.claims import examine
from rsotrain.report.comparison import compare
from rsotrain.report.document import document
from rsotrain.report.live import runs_table
from rsotrain.report.page import page
from rsotrain.report.plots import draw, svg_text
from rsotrain.report.records import MAX_LINE_BYTES, MAX_TORN_LINES, read_history
from rsotrain.report.runs import read_run, read_runs
from rsotrain.report.tables import comma_separated, screen
from rsotrain.tracking.run_files import RunState

pytestmark = pytest.mark.timeout(120)

DEEP = 100_000
Damage = Callable[[Path], None]


def holding(content: str | bytes) -> Damage:
    def damage(file: Path) -> None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def in_place_of(make_it: Callable[[Path], object]) -> Damage:
    def damage(file: Path) -> None:
        file.unlink(missing_ok=True)
        make_it(file)

    return damage


# What cannot be read, whatever the file.
OTHERS: dict[str, Damage] = {
    "a FIFO": in_place_of(os.mkfifo),
    "a device": in_place_of(lambda file: file.symlink_to("/dev/zero")),
    "a folder": in_place_of(Path.mkdir),
    "a link to nothing": in_place_of(lambda file: file.symlink_to("nowhere")),
    "a circle of links": in_place_of(lambda file: file.symlink_to(file.name)),
    "no UTF-8": holding(b"a: \xff\xfe"),
    "NUL": holding(b"\0" * 1000),
    "an endless line": holding(b"x" * (2 * MAX_LINE_BYTES)),
    "nesting": holding("[" * DEEP),
    "digits": holding("9" * 5000),
    "empty": holding(""),
}
BOMB = "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnop"))
YAML: dict[str, Damage] = {
    "a bomb of aliases": holding(f"a: &a [x, x]\n{BOMB}"),
    "itself": holding("a: &a [*a]"),
    "a date that does not exist": holding("a: 2024-02-30"),
    "digits of a value": holding(f"seed: {'9' * 5000}"),
    "digits in base 16": holding(f"seed: 0x{'f' * 5000}"),
    "an empty integer": holding('seed: !!int ""'),
    "a truth value that is none": holding("seed: !!bool x"),
    "an object of Python's": holding("!!python/object/apply:os.system ['exit 3']"),
    "a deep mapping": holding("".join(f"{' ' * i}a:\n" for i in range(200))),
    "two documents": holding("a: 1\n---\nb: 2"),
    "a number": holding("3"),
    "a list": holding("[1]"),
}  # fmt: skip


def read_whole(folder: Path, told: list[str]) -> list[str]:
    """All texts of a report on the runs in ``folder``; the names of the runs."""
    runs = read_runs([folder], told.append)
    groups = compare(runs, mixed=True)
    findings = examine(runs)
    page(groups, {}, "title", findings)
    document(groups, findings, [], "title", "command")
    comma_separated(groups)
    screen(groups, 80)
    runs_table(runs, 80)
    return sorted(run.name for run in runs)


@pytest.mark.parametrize("damage", OTHERS | YAML)
def test_a_damaged_configuration_costs_that_run(damage: str, make: Make) -> None:
    good, bad = make("good"), make("bad")
    (OTHERS | YAML)[damage](bad / "config.yaml")
    told: list[str] = []
    assert read_whole(good.parent, told) == ["good"]
    (sentence,) = told
    assert sentence.startswith(f"left out: {bad / 'config.yaml'}")
    assert sentence.isprintable()
    with pytest.raises(UserError, match="bad"):
        read_runs([bad])


@pytest.mark.parametrize("damage", OTHERS)
def test_damaged_metrics_cost_that_run(damage: str, make: Make) -> None:
    good, bad = make("good"), make("bad")
    OTHERS[damage](bad / "metrics.jsonl")
    assert read_whole(good.parent, []) == ["good"]
    with pytest.raises(UserError, match=r"bad.* (has no metrics|holds no record|cannot be read|is damaged)"):
        read_runs([bad])


@pytest.mark.parametrize("damage", OTHERS)
@pytest.mark.parametrize("name", ["summary.json", "run.json"])
def test_a_damaged_summary_or_record_leaves_what_is_known(name: str, damage: str, make: Make) -> None:
    bad = make("bad")
    OTHERS[damage](bad / name)
    assert read_whole(bad.parent, []) == ["bad"]
    assert read_run(bad).latest("val/loss") == 2.0
    assert read_run(bad).finished == (name == "run.json")


VALUES: dict[str, Any] = {
    "400 digits": 10**400, "4000 digits": -(10**4000), "large": 1e308, "small": -1e308, "inf": math.inf,
    "nan": math.nan, "true": True, "null": None, "text": "1", "list": [1], "object": {"a": 1}, "less": -1.5,
    "zero": 0, "subnormal": 1e-320, "largest": 1e59,
}  # fmt: skip
METRICS = (
    "val/loss", "train/loss", "tokens", "time", "throughput/tokens_per_second", "memory/parameters_bytes",
    "memory/peak_bytes", "subspace/overlap", "subspace/refresh_seconds", "memory/saved_activations_bytes",
)  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_figures_of_any_kind_and_size_are_drawn_or_left_out(name: str, make: Make) -> None:
    for seed in (0, 1):
        make(f"a{seed}", metrics=dict.fromkeys(METRICS, VALUES[name]), seed=seed)
        folder = make(f"g{seed}", seed=seed, optimizer__name="galore", sampler__name="svd").parent
    assert read_whole(folder, []) == ["a0", "a1", "g0", "g1"]
    figures = draw(compare(read_runs([folder])))
    for picture in {"validation_loss_by_steps", "memory", "throughput"} & set(figures):
        svg_text(picture, figures[picture])


@pytest.mark.parametrize("value", [True, -1, 1.5, "3", None, [], 10**20, 10**400])
def test_what_has_no_step_is_no_record(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{json.dumps({'step': value})}\n{json.dumps({'step': 3})}\n")
    assert read_history(file) == [{"step": 3}]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b"[" * DEEP, b"9" * 5000, b'{"step": 2, "x": "\xff"}', b"[1]"]
    file.write_bytes(b"\n".join([*lines, b"x" * MAX_LINE_BYTES, b'{"step": 3}', b'{"step": 4']))
    assert [record["step"] for record in read_history(file)] == [1, 2, 3]
    file.write_text("nonsense\n" * (MAX_TORN_LINES + 1))
    with pytest.raises(UserError, match="more than 10,000 of its lines are no records"):
        read_history(file)


SETTINGS: dict[str, Any] = {
    "list": [1, [2]], "object": {"a": {"b": 1}}, "long": "x" * 100_000, "nan": math.nan, "inf": math.inf,
    "30 digits": 10**29, "null": None, "empty": "", "text": "many", "negative": -1,
}  # fmt: skip
KEYS = (
    "seed", "steps", "model", "model__name", "optimizer__name", "optimizer__update_proj_gap", "batch_size",
    "data", "tokenizer__name",
)  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("key", KEYS)
def test_settings_of_any_kind_are_compared(key: str, name: str, make: Make) -> None:
    make("a", optimizer__name="galore", sampler__name="svd", metrics={"subspace/refresh_seconds": 0.1})
    make("o", optimizer__name="osd", sampler__name="online_pca", metrics={"subspace/refresh_seconds": 0.1})
    b = make("b", **{key: SETTINGS[name]})
    assert read_whole(b.parent, []) == ["a", "b", "o"]


def test_labels_fit_on_a_line(make: Make) -> None:
    make("a", data__path="x" * 10_000)
    groups = compare(read_runs([make("b", data__path="y" * 10_000).parent]), mixed=True)
    assert max(len(group.label) for group in groups) < 100


def test_records_of_any_kind_tell_the_state_as_well_as_they_can(make: Make) -> None:
    odd: list[Any] = [{"state": []}, {"state": {}}, {"state": 3}, {"host": [], "pid": "x"}]
    odd += [{"data": 3, "state": "failed"}, []]
    for i, record in enumerate(odd):
        (make(f"r{i}", finished=False) / "run.json").write_text(json.dumps(record))
    states = [run.state for run in read_runs([make("z").parent])]
    assert states == [RunState.running] * 4 + [RunState.failed, RunState.running, RunState.finished]


def test_a_run_that_diverged_beyond_numbers_has_no_perplexity(make: Make) -> None:
    for name in ("adam", "galore"):
        folder = make(name, 900.0, optimizer__name=name, sampler__name="svd" if name == "galore" else "none")
    (finding, *_) = examine(read_runs([folder.parent]))
    assert any("perplexity inf against inf" in part.figures for part in finding.parts)


@pytest.mark.parametrize("path", ["~no_such_user_here/x", "a\0b", "x" * 5000, "loop"])
def test_what_is_no_path_is_one_sentence(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for mode in ((), ("--watch",), ("--live",)):
        with pytest.raises(UserError, match="cannot be read"):
            call(path, *mode)


def test_a_folder_that_may_not_be_read_is_one_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("a").parent

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="outputs cannot be read: Permission denied"):
        read_runs([folder])


# --- W&B's files -----------------------------------------------------------------------------------


def offline_folder(parent: Path, name: str, content: bytes | None) -> Path:
    folder = parent / f"offline-run-20260101_000000-{name}"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / f"run-{name}.wandb").write_bytes(content)
    return folder


@pytest.mark.alone
def test_damaged_wandb_files_cost_their_run(make: Make) -> None:
    parent = make("good").parent
    garbage = offline_folder(parent, "garbage", b"\0" * 1000)
    two = offline_folder(parent, "two", b"")
    (two / "run-other.wandb").touch()
    os.mkfifo(offline_folder(parent, "fifo", None) / "run-fifo.wandb")
    told: list[str] = []
    assert read_whole(parent, told) == ["good"]
    assert len(told) == 2
    assert f"{garbage} cannot be read by `wandb leet inspect`: " in told[0]
    assert told[1] == f"left out: {two} holds 2 files of W&B's, not one"
    with pytest.raises(UserError, match="cannot be read by `wandb leet inspect`"):
        read_runs([garbage])


def test_what_wandbs_reader_says_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = offline_folder(tmp_path, "x", b"")
    lines = [
        b"[" * DEEP, b"9" * 5000, b"\xff", b"3", b"{}", b'{"type": "run", "run": []}',
        b'{"type": "run", "run": {"display_name": [], "config": {"update": 3}}}',
        b'{"type": "run", "run": {"config": {"update": ' + b'{"a":' * 400 + b"1" + b"}" * 400 + b"}}}",
        b'{"type": "history", "history": {"item": {"step": true}}}',
        b'{"type": "history", "history": {"item": 3}}',
        b'{"type": "history", "history": {"item": {"step": 2, "time": ' + b"9" * 4000 + b"}}}",
        b'{"type": "history", "history": {"item": {"step": 3, "val/loss": 2.5, "_x": 1}}}',
        b'{"type": "summary", "summary": {"update": [1]}}', b'{"type": "exit", "exit": {"exit_code": "0"}}',
    ]  # fmt: skip
    done = subprocess.CompletedProcess([], 0, stdout=b"\n".join(lines), stderr=b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    (run,) = read_runs([folder])
    assert (run.name, run.step, run.last("val/loss"), run.last("time")) == ("x", 3, 2.5, None)
    assert run.state is RunState.failed
    assert read_whole(folder, []) == ["x"]

    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("wandb", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UserError, match="does not come to an end"):
        read_runs([folder])


@pytest.mark.slow
def test_a_multirun_says_what_is_damaged_beside_it(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [make("a"), make("b", optimizer__name="galore")]
    os.mkfifo(make("c") / "x")
    (make("d") / "config.yaml").write_text("a: 2024-02-30")
    compare_members(members, ReportConfig(path=str(tmp_path / "report")))
    (line,) = capsys.readouterr().err.splitlines()
    assert "d/config.yaml is damaged: day is out of range for month, so nobody knows what" in line
    assert "day is out of range" in (tmp_path / "report/report.md").read_text()
    assert "day is out of range" in (tmp_path / "report/report.html").read_text()
