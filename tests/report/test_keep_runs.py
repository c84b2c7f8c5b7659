"""What is kept of runs gives the same tables as the runs themselves."""

import json
import subprocess
import sys
from pathlib import Path

from helpers.command import ROOT
from helpers.report_harness import Make

from rsotrain.report.comparison import compare
from rsotrain.report.runs import read_runs
from rsotrain.report.tables import comma_separated, run_list


def kept(*arguments: Path) -> "subprocess.CompletedProcess[str]":
    *runs, to = arguments
    tool = [sys.executable, ROOT / "tests/tools/keep_runs.py", *runs, "--to", to]
    return subprocess.run(tool, capture_output=True, text=True)


def test_what_is_kept_has_the_same_tables_and_no_places(make: Make, tmp_path: Path) -> None:
    places = {"output_dir": "/secret/out", "data__path": "/secret/corpus.txt"}
    runs = [make("a", 2.0, **places), make("b", 3.0, seed=1, **places)]
    runs.append(make("c", optimizer__name="galore", **places))
    unfinished = make("d", finished=False, **places)
    record = runs[0] / "run.json"
    record.write_text(json.dumps({"run_id": "1", "state": "finished", "host": "secret", "pid": 1}))
    runs[1].joinpath("run.json").unlink(missing_ok=True)
    to = tmp_path / "kept"
    result = kept(runs[0].parent, to)
    assert result.returncode == 0
    assert f"{unfinished.name} is not kept" in result.stdout
    before, after = compare(read_runs(runs), mixed=True), compare(read_runs([to]), mixed=True)
    assert comma_separated(after) == comma_separated(before)
    assert run_list(after) == run_list(before)
    for own, copy in zip(before[0].runs, after[0].runs, strict=True):
        assert copy.series("val/loss") == own.series("val/loss")
    texts = "".join(file.read_text() for file in to.rglob("*") if file.is_file())
    assert "secret" not in texts
    assert "corpus.txt" in texts


def test_nothing_is_overwritten(make: Make) -> None:
    run = make("a")
    before = (run / "metrics.jsonl").read_text()
    result = kept(run, run.parent)
    assert result.returncode == 1
    assert "exists already" in result.stderr
    assert (run / "metrics.jsonl").read_text() == before
