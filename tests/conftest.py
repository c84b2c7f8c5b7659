"""What all tests share: one thread, a cache of their own, a small corpus, a way to call the command."""

import gc
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.command import Cli
from helpers.warm import run_command

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)

import pytest
import torch

# What runs in the background or without a terminal ignores these, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ["helpers.wandb_harness", "helpers.report_harness"]  # their fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files that fork ranks (``import ranks``)."""
    for item in items:
        if hasattr(getattr(item, "module", None), "ranks"):
            item.add_marker(pytest.mark.alone)


def pytest_collection_finish() -> None:
    """Modules and ten thousand tests stay to the end: the collector need not go through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the session: the user's own is neither read nor written."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("RSOTRAIN_CACHE_DIR")
    os.environ["RSOTRAIN_CACHE_DIR"] = str(folder)
    yield folder
    os.environ.pop("RSOTRAIN_CACHE_DIR")
    if before is not None:
        os.environ["RSOTRAIN_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training file, validation file): 300 and 20 short documents of pseudo-English."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the a ship whale sea of and sailed over under captain dark bright".split()  # noqa: SIM905

    def document(seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(words), (60,), generator=generator).tolist()
        return " ".join(words[i] for i in picks).capitalize() + ".\n"

    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, seeds in zip(paths, (range(300), range(1000, 1020)), strict=True):
        path.write_text("".join(json.dumps({"text": document(seed)}) + "\n" for seed in seeds))
    return paths


@pytest.fixture(scope="session")
def tiny(corpus: tuple[Path, Path]) -> list[str]:
    """Overrides of a run that takes a second or two."""
    return [
        "model=llama_tiny", "data=files", f"data.path={corpus[0]}", f"data.validation_path={corpus[1]}",
        "tokenizer.vocab_size=300", "seq_len=32", "batch_size=4", "steps=6", "eval_every=null",
        "save_every=2", "log_every=1", "logger=jsonl", "precision=fp32", "evaluation.samples=false",
    ]  # fmt: skip


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``python -m rsotrain …`` in an empty folder and return the finished process."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_command(arguments, tmp_path, os.environ | {"COLUMNS": "200"} | environment)

    return call
