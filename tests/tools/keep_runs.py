"""Copies what a report needs of finished runs, a few kilobytes each, so that their results can be committed.

    python tests/tools/keep_runs.py outputs/study_full --to outputs/study/runs
    rsotrain-report outputs/study/runs

Of the metrics it keeps each validation, and the last step's. Where a run was made is left out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from rsotrain.errors import UserError
from rsotrain.files import read_json, read_yaml
from rsotrain.report.runs import Run, read_runs
from rsotrain.tracking.run_files import CONFIG, METRICS, RUN_RECORD, SUMMARY

PLACES = ("output_dir", "cache_dir")  # of the configuration
OF_THE_RECORD = ("run_id", "state", "data")


def keep(run: Run, folder: Path) -> None:
    """Write the files of ``run``, a finished one, into ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in read_yaml(run.path / CONFIG).items() if key not in PLACES}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    record: Any = read_json(run.path / RUN_RECORD)
    _write_lines(folder / RUN_RECORD, {key: record[key] for key in OF_THE_RECORD if key in record})
    _write_lines(folder / SUMMARY, read_json(run.path / SUMMARY))
    trained = [record for record in run.history if "train/loss" in record]
    kept = [record for record in run.history if "val/loss" in record or record is trained[-1]]
    _write_lines(folder / METRICS, *kept)


def _write_lines(file: Path, *records: Any) -> None:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--to", required=True, type=Path)
    arguments = parser.parse_args()
    try:
        runs = read_runs(arguments.runs)
    except UserError as error:
        sys.exit(str(error))
    for run in runs:
        if run.finished:
            keep(run, arguments.to / run.name)
        else:
            print(f"{run.name} is not kept: it is {run.state.value}")


if __name__ == "__main__":
    main()
