"""README as a newcomer walks it: the lines of its blocks are run one after the other, in one folder.

They are made small enough for a CPU: a tiny model, two steps. Lines that need several GPUs, a SLURM or the
network are named below, with the tests that stand for them.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.command import ROOT, call_main
from helpers.corpora import TEXTS, json_lines
from helpers.pages import commands

from rsotrain.cli import entry
from rsotrain.report import cli as report

ELSEWHERE = {
    "pip install": "needs the network; tests/test_packaging.py builds and installs the package",
    "eval ": "needs a shell; tests/cli/test_front_door.py::test_version_and_completion",
    "torchrun ": "needs several GPUs; tests/training/test_sharding.py has several processes on a CPU",
    "srun ": "needs a SLURM; tests/parallel/test_slurm_steps.py",
    "sbatch ": "needs a SLURM; tests/cli/test_slurm_array.py and tests/parallel/test_slurm_cluster.py",
}
SMALL = {
    "model": "llama_tiny", "tokenizer.vocab_size": "300", "seq_len": "32", "batch_size": "4", "steps": "2",
    "evaluation.max_tokens": "200", "logger": "jsonl", "evaluation.samples": "false",
}  # fmt: skip


def lines() -> list[str]:
    return [
        line for line in commands((ROOT / "README.md").read_text()) if not line.startswith(tuple(ELSEWHERE))
    ]


def small(words: list[str]) -> list[str]:
    """A line of README, smaller: of a training run what ``SMALL`` says, whatever it says itself."""
    if "--help" in words or "--cfg" in words:
        return words
    given = {word.partition("=")[0] for word in words}
    mode = next((word for word in words if word.startswith("mode=")), "mode=train")
    taken = {"mode=train": SMALL, "mode=plan": SMALL, "mode=evaluate": {"seq_len": "32"}}.get(mode, {})
    own = {"model"} if {"model=mine", "model.init_from=my_model"} & set(words) else set()
    if "data=files" not in words:  # whose characters would not fit, or the tokenizer is a model's own
        own |= {"tokenizer.vocab_size"}
    taken = {key: value for key, value in taken.items() if key not in own}
    left = [word for word in words if word.partition("=")[0] not in taken]
    small_fraction = "data.validation_fraction" in given or "experiment=finetune_sft" in words
    more = ["data.validation_fraction=0.3"] if small_fraction else []
    left = [word for word in left if not (more and word.startswith("data.validation_fraction="))]
    return [*left, *(f"{key}={value}" for key, value in taken.items()), *more]


def newcomers_files() -> None:
    """What README takes for granted that a reader has."""
    for name in ("corpus.jsonl", "mine.jsonl"):
        Path(name).write_bytes(json_lines(TEXTS[:200]))
    Path("books").mkdir()
    for number in range(2):
        Path(f"books/{number}.txt").write_text("\n".join(TEXTS[number * 100 : number * 100 + 100]))
    Path("shards").mkdir()
    for name in ("shards/a.parquet", "held_out.parquet"):
        pq.write_table(pa.table({"text": TEXTS[:100]}), name)
    rows = [{"instruction": f"Count to {n}.", "output": f"One to {n}."} for n in range(60)]
    Path("instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_conf/model").mkdir(parents=True)
    shutil.copy(ROOT / "conf/model/llama_tiny.yaml", "my_conf/model/mine.yaml")


@pytest.mark.long
def test_every_line_of_readme_can_be_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    newcomers_files()
    first: Path | None = None
    for line in lines():
        program, *words = shlex.split(line)
        if first is not None:
            words = [word.replace("outputs/<run>", str(first)) for word in words]
        if "model.init_from=my_model" in words:
            assert call_main(entry, ["mode=export", f"checkpoint.path={first}"]) == 0
            shutil.move(f"{first}/export", "my_model")
        if program == "rsotrain-report":
            monkeypatch.setattr(sys, "argv", [program, *words])
            report.main()
        else:
            assert program == "rsotrain"
            assert call_main(entry, small(words)) == 0, f"{line}\n{capsys.readouterr().err}"
        if first is None:
            (first,) = Path("outputs").iterdir()
    assert Path("report/report.html").is_file()
    # The quickstart, the comparison, own data, fine-tuning; two more lines are, as small, runs of these.
    assert len(list(Path("outputs").glob("*/summary.json"))) == 1 + 6 + 3 + 1
