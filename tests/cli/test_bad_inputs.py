"""Bad inputs for every key: one sentence, exit status 2 and nothing left behind, or else a start as typed."""

import os
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers.bad_inputs import GROUPS, Case, bad_inputs
from helpers.command import call_main
from helpers.warm import run_command

from rsotrain.config.keys import field_types
from rsotrain.config.schema import Config

CASES = bad_inputs(per_key=7)
SAMPLE = random.Random(1).sample(range(len(CASES)), 60)
ROWS = '{"text": "a", "instruction": "b", "output": "c"}\n'


def parameters(numbers: list[int]) -> list[Any]:
    marks = dict.fromkeys(SAMPLE, pytest.mark.slow) | dict.fromkeys(SAMPLE[:20], ())
    return [
        pytest.param(CASES[n], id=f"{n}-{CASES[n].key}", marks=marks.get(n, pytest.mark.long))
        for n in numbers
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_refused(case: Case, status: int, out: str, err: str, folder: Path) -> None:
    assert status == 2
    assert err.startswith("rsotrain: ")
    assert err.count("\n") == 1
    assert len(err) < 1600
    assert case.key in err  # and no other key
    assert out == ""
    assert os.listdir(folder) == ["rows.jsonl"]


def test_every_key_and_group_has_bad_inputs() -> None:
    assert len(CASES) > 700
    assert {case.key.removesuffix(".x").removesuffix("x") for case in CASES} >= {
        key.removesuffix("x") for key in (*field_types(), *GROUPS)
    }
    assert sum(case.starts is False for case in CASES) > 600


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", parameters(list(range(len(CASES)))))
def test_a_bad_input_is_refused_or_starts_as_typed(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rsotrain.cli import entry as cli

    started: list[Config] = []

    def run_mode(config: Config) -> dict[str, object]:
        started.append(config)
        return {}

    # In place of what imports torch and trains; all that comes before it is the real thing.
    def settled(config: Config) -> Config:
        return config

    dispatch = types.SimpleNamespace(run_mode=run_mode, settle=settled)
    monkeypatch.setitem(sys.modules, "rsotrain.cli.dispatch", dispatch)
    status = call_main(cli, ["output_dir=out", *case.command])
    captured = capsys.readouterr()
    if status != 0:
        assert started == []
        is_refused(case, status, captured.out, captured.err, folder)
        return
    assert case.starts is not False, f"{case.command} would have run"
    (config,) = started
    value: Any = config
    for name in case.key.split("."):
        value = getattr(value, name)
    assert value == case.value
    assert captured.err == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "case", parameters(random.Random(2).sample([n for n, c in enumerate(CASES) if c.starts is False], 20))
)
def test_a_bad_input_in_a_process_of_its_own(case: Case, folder: Path) -> None:
    if "\0" in case.typed:
        pytest.skip("no argument of a process can hold a NUL character")
    result = run_command(["output_dir=out", *case.command], Path.cwd(), os.environ)
    is_refused(case, result.returncode, result.stdout, result.stderr, folder)
