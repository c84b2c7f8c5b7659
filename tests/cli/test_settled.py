"""compile=null: decided at the start, by the device, and a part of what the run is."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.runs import compose

from rsotrain.cli.dispatch import settle_compile
from rsotrain.config.identity import identity, run_name
from rsotrain.models.compiling import is_worthwhile


@pytest.mark.parametrize("triton", [False, True])
def test_compiling_is_for_gpus_with_triton(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return (object() if triton else None) if name == "triton" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert is_worthwhile(torch.device("cuda", 0)) == triton
    assert not is_worthwhile(torch.device("cpu"))


def test_on_a_cpu_the_run_is_what_it_was_before() -> None:
    given = compose(["model=llama_tiny"])
    assert given.compile is None
    settled = settle_compile(replace(given, device=given.device))
    assert settled.compile is False
    assert run_name(settled) == run_name(given) == run_name(compose(["model=llama_tiny", "compile=false"]))
    assert identity(settled) == identity(given)
    assert identity(given)["compile"] is False
    assert settle_compile(compose(["mode=plan"])).compile is None


def test_on_a_gpu_the_name_says_that_it_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rsotrain.cli.dispatch.is_worthwhile", lambda _: True)
    settled = settle_compile(compose(["model=llama_tiny"]))
    assert settled.compile is True
    assert run_name(settled) == run_name(compose(["model=llama_tiny", "compile=true"]))
    for given in ("true", "false"):
        said = compose(["model=llama_tiny", f"compile={given}"])
        assert settle_compile(said) == said
