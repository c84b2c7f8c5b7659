"""compile=true: one graph a block without a break, the same training, and a way on without a compiler."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import ranks
from helpers.runs import compose

from rsotrain.config.schema import Config
from rsotrain.parallel.ranks import World
from rsotrain.training.random_data import random_data
from rsotrain.training.trainer import Trainer

SMALL = [
    "model=llama_tiny", "tokenizer.vocab_size=300", "seq_len=16", "batch_size=4", "precision=fp32",
    "optimizer.lr=0.001", "device=cpu",
]  # fmt: skip


VARIED = ["model.attention_bias=true", "model.mlp_bias=true", "model.qk_norm=true", "model.head_dim=12"]


@pytest.fixture(autouse=True)
def _traced_not_generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend that traces, forward and backward, and generates nothing: seconds instead of minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **({"backend": "aot_eager"} | k)))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graph_breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def losses(config: Config, steps: int, world: World | None = None) -> list[float]:
    trainer = Trainer(config, random_data(config), world)
    result = [trainer.train_step().loss for _ in range(steps)]
    with torch.no_grad():
        inputs, targets = trainer.micro_batches()[0]
        return [*result, float(trainer.model(inputs, targets))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "number"),
    [
        (["adam"], 1),
        (["galore", "precision=bf16_mixed"], 1),
        (["adam", "activation_checkpointing=mlp"], 1),
        (["rso"], 1),
        (["rso", "optimizer.projection=regenerated"], 1),
        (["rso", "optimizer.projection=regenerated", "activation_checkpointing=block"], 1),
        (["rso_pca", "optimizer.update_proj_gap=2"], 2),  # that of the steps that gather XᵀX is another
        (["rso_pca", "optimizer.update_proj_gap=1"], 1),
        (["adam", *VARIED, "activation_checkpointing=mlp"], 1),
        (["rso", *VARIED], 1),
        (["relora", *VARIED, "optimizer.merge_every=2", "optimizer.restart_warmup_steps=1"], 1),
    ],
)
def test_no_block_breaks_its_graph(options: list[str], number: int) -> None:
    """Neither in training nor without gradients, whose graph comes in addition; blocks share them."""
    optimizer, *rest = options
    config = compose([*SMALL, f"optimizer={optimizer}", *rest])
    eager = losses(config, 4)
    compiled = losses(dataclasses.replace(config, compile=True), 4)
    assert graph_breaks() == {}
    assert graphs() == number + 1
    # the same arithmetic, in another order of fp32 sums; bf16 rounds it to 8 bits
    assert compiled == pytest.approx(eager, rel=1e-5 if "precision=bf16_mixed" not in options else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "model"), [("galore", []), ("rso", []), ("rso", VARIED), ("lora", [])])
def test_sharded_blocks_have_one_graph_too(optimizer: str, model: list[str], tmp_path: Path) -> None:
    """FSDP's hooks stay outside of it."""
    config = compose([*SMALL, f"optimizer={optimizer}", "parallelism=fsdp", *model])

    def check(world: World) -> tuple[list[float], list[float], dict[str, int]]:
        eager = losses(config, 2, world)
        return eager, losses(dataclasses.replace(config, compile=True), 2, world), graph_breaks()

    for eager, compiled, breaks in ranks.succeeded(ranks.run(2, {"c": check}, tmp_path)["c"]):
        assert breaks == {}
        assert compiled == pytest.approx(eager, rel=1e-5)


def backend_without_triton(graph: Any, inputs: Any) -> Any:
    from torch._inductor.exc import TritonMissing

    raise TritonMissing(None)


def backend_without_compiler(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no C++ compiler found")


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        (backend_without_compiler, "no C.. compiler found"),
        (backend_without_triton, "Cannot find a working triton"),  # which is not wrapped as other errors are
    ],
)
def test_without_a_compiler_the_run_goes_on(
    backend: Any, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **(k | {"backend": backend})))
    config = compose([*SMALL, "optimizer=adam"])
    with pytest.warns(RuntimeWarning, match=f"the compiler failed .*{cause}.*goes on") as caught:
        compiled = losses(dataclasses.replace(config, compile=True), 3)
    assert sum("compiler failed" in str(w.message) for w in caught) == 1
    assert compiled == losses(config, 3)
