"""What a registration needs is there, and where something is missing the sentence names the file to edit."""

from pathlib import Path

import pytest
from helpers.command import ROOT, Cli
from helpers.methods import SAMPLERS
from helpers.runs import OPTIMIZERS, compose

from rsotrain.config import methods
from rsotrain.config.choices import InnerSolver
from rsotrain.config.registry import CODE
from rsotrain.config.schema import SCHEMAS
from rsotrain.optim.base import ParamGroupOptimizer
from rsotrain.optim.build import build_sampler, code_of, method_of
from rsotrain.optim.solvers import SOLVERS
from rsotrain.subspace.samplers import Sampler

MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("llama_*.yaml"))
SCHEDULES = sorted(path.stem for path in (ROOT / "conf" / "lr_scheduler").glob("*.yaml"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_code_and_a_sampler_of_its_own(name: str) -> None:
    config = compose(["model=llama_tiny", f"optimizer={name}"])
    assert config.optimizer.name == name, f"conf/optimizer/{name}.yaml gives another name"
    method = method_of(config.optimizer)
    assert issubclass(method, ParamGroupOptimizer)
    method.refuse(config.optimizer, build_sampler(config.sampler))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_has_code(name: str) -> None:
    config = compose(["model=llama_tiny", "optimizer=galore", f"sampler={name}"]).sampler
    assert config.name == name, f"conf/sampler/{name}.yaml gives another name"
    built = build_sampler(config)
    assert built is None if name == "none" else isinstance(built, Sampler)


@pytest.mark.parametrize("group", ["optimizer", "sampler"])
def test_every_schema_is_that_of_a_file(group: str) -> None:
    text = "".join(file.read_text() for file in (ROOT / "conf" / group).glob("*.yaml"))
    for schema in SCHEMAS[group]:
        assert f"/schema/{group}/{schema}@" in text, f"no file of conf/{group} has the schema {schema}"


def test_every_solver_has_a_rule() -> None:
    assert set(SOLVERS) == set(InnerSolver)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_a_rule(name: str) -> None:
    from rsotrain.training.lr_scheduler import lr_factor

    config = compose(["model=llama_tiny", f"lr_scheduler={name}"]).lr_scheduler
    assert all(0.0 <= lr_factor(config, step, 100) <= 1.0 for step in range(100))


def test_code_that_is_not_there_is_named_with_its_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("rsotrain.nowhere:Method", "rsotrain.optim.galore:Nothing"):
        monkeypatch.setitem(CODE, methods.GaLoreConfig, place)
        with pytest.raises(AssertionError, match=r"config/methods\.py names rsotrain\.\S+ for GaLoreConfig"):
            code_of(methods.GaLoreConfig)
    monkeypatch.delitem(CODE, methods.GaLoreConfig)
    with pytest.raises(AssertionError, match="GaLoreConfig names no code"):
        code_of(methods.GaLoreConfig)


def test_a_file_with_an_unregistered_schema_is_told_where_to_register_it(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine/sampler"
    folder.mkdir(parents=True)
    (folder / "ours.yaml").write_text("defaults: [/schema/sampler/ours@_here_, _self_]\nname: ours\n")
    result = cli("--config-dir", str(tmp_path / "mine"), "sampler=ours", "optimizer=galore")
    assert result.returncode == 2
    assert "names the schema ours, which nothing in rsotrain/config/samplers.py registers" in result.stderr
