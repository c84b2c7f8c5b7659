"""Copies what a report needs of finished runs, a few kilobytes each, so that their results can be committed.

    python tests/tools/keep_runs.py outputs/study_full --to outputs/study/runs
    rsotrain-report outputs/study/runs

Of the metrics it keeps each validation, and the last step's. Hosts and the paths of data are left out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from rsotrain.errors import UserError
from rsotrain.files import read_yaml
from rsotrain.report.runs import Run, read_object, read_runs
from rsotrain.tracking.run_files import CONFIG, METRICS, RUN_RECORD, SUMMARY

PLACES = ("output_dir", "cache_dir")  # of the configuration
OF_THE_RECORD = ("run_id", "state", "data")


def keep(run: Run, folder: Path) -> None:
    """Write the files of ``run``, a finished one, into ``folder``, which is made. Raises UserError."""
    if folder.exists():
        raise UserError(f"{folder} exists already, and what it holds is not overwritten")
    config = _without_paths(read_yaml(run.path / CONFIG))
    record = read_object(run.path / RUN_RECORD)
    last = [record for record in run.history if "train/loss" in record][-1:]
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    _write_lines(folder / RUN_RECORD, {key: record[key] for key in OF_THE_RECORD if key in record})
    _write_lines(folder / SUMMARY, dict(run.summary))
    _write_lines(
        folder / METRICS, *(record for record in run.history if "val/loss" in record or record in last)
    )


def _without_paths(settings: Any) -> Any:
    """Without the folders of the run, and with the names alone of what other paths end with."""
    if not isinstance(settings, dict):
        return settings
    kept = {key: _without_paths(value) for key, value in settings.items() if key not in PLACES}
    return {
        key: Path(value).name if key.endswith("path") and isinstance(value, str) else value
        for key, value in kept.items()
    }


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
        for run in read_runs(arguments.runs):
            if run.finished:
                keep(run, arguments.to / run.name)
            else:
                print(f"{run.name} is not kept: it is {run.state.value}")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
