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


def test_what_is_kept_has_the_same_tables_and_no_places(make: Make, tmp_path: Path) -> None:
    runs = [make("a", 2.0), make("b", 3.0, seed=1), make("c", optimizer__name="galore")]
    unfinished = make("d", finished=False)
    record = runs[0] / "run.json"
    record.write_text(json.dumps({"run_id": "1", "state": "finished", "host": "secret", "pid": 1}))
    to = tmp_path / "kept"
    tool = [sys.executable, ROOT / "tests/tools/keep_runs.py", runs[0].parent, "--to", to]
    told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    assert f"{unfinished.name} is not kept" in told
    before, after = compare(read_runs(runs)), compare(read_runs([to]))
    assert comma_separated(after) == comma_separated(before)
    assert run_list(after) == run_list(before)
    for own, kept in zip(before[0].runs, after[0].runs, strict=True):
        assert kept.series("val/loss") == own.series("val/loss")
    texts = "".join(file.read_text() for file in to.rglob("*") if file.is_file())
    assert "secret" not in texts
    assert str(tmp_path) not in texts
