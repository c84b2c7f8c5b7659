"""deterministic=true: torch is told so, and told otherwise again; what a resume is, in words."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.runs import compose

from rsotrain.config.identity import run_name
from rsotrain.running.mode import train
from rsotrain.training.determinism import resume_in_words, settle


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_torch_is_told() -> None:
    settle(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    settle(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    settle(False)  # the next run of a multirun
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_a_run_says_how_exact_a_resume_is(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(compose([*tiny, "steps=2", f"output_dir={tmp_path}", "deterministic=true", "device=cpu"]))
    assert torch.are_deterministic_algorithms_enabled()
    assert "a resume is bitwise, with as many threads" in capsys.readouterr().out
    gpu = torch.device("cuda", 0)
    assert "deterministic=true: bitwise" in resume_in_words(gpu, False)
    assert "is bitwise on this kind of GPU" in resume_in_words(gpu, True)


def test_runs_from_before_keep_their_names() -> None:
    assert run_name(compose([])) == run_name(compose(["deterministic=false"]))
    assert run_name(compose([])) != run_name(compose(["deterministic=true"]))
