"""``compile=null`` and ``precision=auto``: the device decides them, and they are part of what the run is."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command import Cli
from helpers.runs import compose

from rsotrain.cli import dispatch
from rsotrain.config.identity import identity, run_folder_path, run_name
from rsotrain.config.keys import plain
from rsotrain.config.schema import Config, Mode, Precision
from rsotrain.models.compiling import is_worthwhile
from rsotrain.running.settled import multiplies_bfloat16, settle_compile, settle_precision


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
    monkeypatch.setattr("rsotrain.running.settled.is_worthwhile", lambda _: True)
    settled = settle_compile(compose(["model=llama_tiny"]))
    assert settled.compile is True
    assert run_name(settled) == run_name(compose(["model=llama_tiny", "compile=true"]))
    for given in ("true", "false"):
        said = compose(["model=llama_tiny", f"compile={given}"])
        assert settle_compile(said) == said


def automatic(*overrides: str) -> Config:
    return replace(compose(["model=llama_tiny", *overrides]), precision=Precision.auto)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``bfloat16(False)``: from here on the CPU has no products of bfloat16."""

    def set_to(has_it: bool) -> None:
        capabilities = {"amx_bf16": has_it, "avx512_bf16": has_it}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")

    return set_to


def test_a_cpu_without_bfloat16_products_trains_in_fp32(bfloat16: Any) -> None:
    bfloat16(False)
    assert not multiplies_bfloat16(torch.device("cpu"))
    assert multiplies_bfloat16(torch.device("cuda", 0))
    settled = settle_precision(automatic("device=cpu"))
    assert settled.precision is Precision.fp32
    assert run_name(settled) == run_name(compose(["model=llama_tiny", "device=cpu", "precision=fp32"]))
    assert settle_precision(automatic("mode=plan")).precision is Precision.bf16_mixed
    assert settle_precision(automatic("mode=plan", "device=cpu")).precision is Precision.fp32
    bf16 = compose(["model=llama_tiny", "device=cpu", "precision=bf16"])
    assert settle_precision(bf16) == bf16


def test_others_train_as_before(bfloat16: Any) -> None:
    bfloat16(True)
    settled = settle_precision(automatic("device=cpu"))
    assert settled == compose(["model=llama_tiny", "device=cpu", "precision=bf16_mixed"])


@pytest.mark.parametrize("name", [[], ["run_name=mine"]])
def test_a_run_keeps_its_precision_on_another_machine(name: list[str], bfloat16: Any, tmp_path: Path) -> None:
    given = automatic("device=cpu", f"output_dir={tmp_path}", *name)
    for begun, other in ((True, False), (False, True)):
        bfloat16(begun)
        first = settle_precision(given)
        placed(first)
        folder = run_folder_path(first)
        bfloat16(other)
        assert settle_precision(given) == first
        assert settle_precision(replace(given, overwrite=True)).precision is not first.precision
        (folder / "config.yaml").write_text("{")  # which the run's start reports
        assert settle_precision(given).precision is not first.precision
        (folder / "config.yaml").unlink()
        folder.rmdir()


def placed(config: Config) -> None:
    """A folder as the run of ``config`` leaves it."""
    folder = run_folder_path(config)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))


def test_what_overwrite_replaces_is_not_the_run_of_an_export(bfloat16: Any, tmp_path: Path) -> None:
    bfloat16(False)
    given = automatic("device=cpu", f"output_dir={tmp_path}")
    placed(replace(given, precision=Precision.bf16_mixed))
    exported = replace(given, mode=Mode.export, overwrite=True)
    assert settle_precision(exported).precision is Precision.bf16_mixed
    # of two runs, as after overwrite=true here, the one of this machine's own precision goes on
    placed(replace(given, precision=Precision.fp32))
    assert settle_precision(given).precision is Precision.fp32


def test_a_run_of_so_many_epochs_keeps_its_precision(
    bfloat16: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their steps are in its name."""
    bfloat16(False)
    given = automatic("device=cpu", f"output_dir={tmp_path}")
    placed(replace(given, steps=7, precision=Precision.bf16_mixed))
    monkeypatch.setattr(dispatch, "settle_epochs", lambda config: replace(config, epochs=None, steps=7))
    assert dispatch.settle(replace(given, epochs=2.0)).precision is Precision.bf16_mixed


def test_a_folder_that_cannot_be_looked_into_holds_no_run(bfloat16: Any, tmp_path: Path) -> None:
    """Where it is to be opened, and cannot, that is said there."""
    bfloat16(False)
    given = automatic("device=cpu", f"output_dir={tmp_path / ('long' * 100)}")
    with pytest.raises(OSError, match="too long"):
        run_folder_path(given).is_file()
    assert settle_precision(given).precision is Precision.fp32


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["evaluate", "generate", "export"])
def test_other_modes_find_the_run_of_the_same_settings(mode: str, cli: Cli, tiny: list[str]) -> None:
    settings = [setting for setting in tiny if not setting.startswith("precision=")]
    trained = cli(*settings)
    assert trained.returncode == 0, trained.stderr
    result = cli(*settings, f"mode={mode}")
    assert result.returncode == 0, result.stderr
