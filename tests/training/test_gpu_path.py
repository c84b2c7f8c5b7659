"""Every method's path on GPUs, walked with fake CUDA tensors by ``tools/gpu_path.py`` in its own process."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers.command import ROOT
from helpers.runs import EACH_OPTIMIZER, KINDS, OPTIMIZERS

# For llama_tiny, whose 14 matrices have 3 shapes: launches of the optimizer's part of a step, and of one in
# which all bases are drawn anew, or adapters merged; how often the host waits in the first, once for the
# loss, and in the second.
BUDGETS: Mapping[str, tuple[int, int, int, int]] = {
    "adam": (12, 12, 1, 1),
    "adam8bit": (278, 278, 1, 1),
    "adam_mini": (68, 68, 1, 1),
    "alice": (128, 3415, 1, 2),
    "alice_0": (122, 3322, 1, 2),
    "apollo": (92, 2543, 1, 1),
    "apollo_mini": (95, 2546, 1, 1),
    "carry": (89, 794, 1, 1),
    "dion2": (112, 112, 1, 1),
    "fira": (113, 543, 1, 1),
    "foam": (61, 61, 1, 1),
    "frugal": (53, 347, 1, 1),
    "galore": (38, 468, 1, 1),
    "galore8bit": (314, 744, 1, 1),
    "i3s": (41, 3239, 1, 2),
    "ldadam": (879, 725, 1, 1),
    "lion": (28, 28, 1, 1),
    "lora": (12, 12, 1, 1),
    "muon": (79, 79, 1, 1),
    "normuon": (115, 115, 1, 1),
    "orbit": (126, 831, 1, 1),
    "orbit8bit": (399, 1907, 1, 1),
    "osd": (1708, 1050, 1, 1),
    "racs": (122, 122, 1, 1),
    "relora": (12, 376, 1, 1),
    "rso": (34, 602, 1, 1),
    "rso_pca": (38, 662, 1, 1),
    "scale": (51, 51, 1, 1),
    "sm": (61, 505, 1, 1),
    "sn": (45, 45, 1, 1),
    "sn_sm": (66, 510, 1, 1),
    "soap": (70, 734, 1, 1),
    "sumo": (116, 574, 1, 1),
}

OPTIMIZER_PHASES = ("optimizer step", "refresh")

# One sampler of each way to draw with a method that takes it
SAMPLERS = (
    "block_power dct golore importance mixture online_pca randomized_svd row_norm srht switching topk_norm"
)
SAMPLED = ("rso:coordinate", *(f"galore:{sampler}" for sampler in SAMPLERS.split()))

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs a C++ compiler for torch's device guard"
)


def walked(methods: Sequence[str], *options: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        target = Path(folder) / "counted.json"
        command = [sys.executable, "tests/tools/gpu_path.py", "--json", str(target), *methods, *options]
        subprocess.run(command, cwd=ROOT, check=True, timeout=500)
        return json.loads(target.read_text())  # type: ignore[no-any-return]


@cache
def on_one_gpu(methods: Sequence[str]) -> dict[str, Any]:
    return walked(methods)


def alone_on_one_gpu(optimizer: str) -> Any:
    others = tuple(name for name in OPTIMIZERS if name not in KINDS)
    return on_one_gpu(KINDS if optimizer in KINDS else others)[optimizer]


def assert_whole(result: Mapping[str, Any]) -> None:
    assert result["failure"] is None
    assert result["problems"] == {}
    assert "step after load" in result["stages"]


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_every_tensor_is_where_its_operation_is(optimizer: str) -> None:
    assert_whole(alone_on_one_gpu(optimizer))


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_launches_and_waits_stay_within_the_budget(optimizer: str) -> None:
    stages = alone_on_one_gpu(optimizer)["stages"]
    step, refresh = stages["step 2"], stages.get("refresh", stages["step 2"])
    launches = [sum(s["launches"].get(phase, 0) for phase in OPTIMIZER_PHASES) for s in (step, refresh)]
    waits = [sum(s["syncs"].values()) for s in (step, refresh)]
    for counted, allowed in zip([*launches, *waits], BUDGETS[optimizer], strict=True):
        assert counted <= allowed


@pytest.mark.slow
def test_documents_cost_no_wait() -> None:
    """Attention inside documents, by their beginnings."""
    result = walked(["galore"], "--", "data.document_mask=true", "micro_batch_size=2")["galore"]
    assert_whole(result)
    assert sum(result["stages"]["step 2"]["syncs"].values()) == 1


# Launches of the optimizer's part of an ordinary step of llama_1b in bfloat16. Others decompose in each step.
LARGE_BUDGETS = dict.fromkeys((
    "adam", "adam_mini", "alice", "alice_0", "apollo", "apollo_mini", "carry", "dion2", "fira", "foam",
    "frugal", "galore", "i3s", "lion", "lora", "muon", "normuon", "orbit", "racs", "relora", "rso", "rso_pca",
    "scale", "sm", "sn", "sn_sm", "sumo",
), 400) | {"soap": 1766}  # fmt: skip
LARGE = ("precision=bf16", "model=llama_1b", "seq_len=1024", "batch_size=4", "micro_batch_size=4")


@pytest.mark.long
def test_a_large_model_s_update_launches_few_kernels() -> None:
    results = walked([*LARGE_BUDGETS], "--ordinary", "--", *LARGE)
    for optimizer, allowed in LARGE_BUDGETS.items():
        result = results[optimizer]
        assert result["failure"] is None, optimizer
        assert result["problems"] == {}, optimizer
        assert sum(result["stages"]["step 2"]["launches"].values()) <= allowed, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "ddp"])
def test_four_gpus(strategy: str) -> None:
    """Methods with state of each kind: elementwise, bases of coefficients, sums over ranks."""
    for result in walked(["adam", "rso_pca", "racs"], "--ranks", "4", "--strategy", strategy).values():
        assert_whole(result)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "ddp"])
def test_every_method_on_four_gpus(strategy: str) -> None:
    for optimizer, result in walked(OPTIMIZERS, "--ranks", "4", "--strategy", strategy).items():
        assert result["failure"] is None, optimizer
        assert result["problems"] == {}, optimizer


@pytest.mark.slow
def test_samplers_of_principal_directions_find_them_by_products() -> None:
    """Eigenvectors make the host wait once more, and take 2,000 launches more."""
    for method, result in walked(["galore:golore", "galore:mixture"]).items():
        assert_whole(result)
        refresh = result["stages"]["refresh"]
        assert sum(refresh["syncs"].values()) == 1, method
        assert refresh["launches"]["refresh"] <= 500, method


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_sampler(ranks: int) -> None:
    for method, result in walked(SAMPLED, "--ranks", str(ranks)).items():
        assert result["failure"] is None, method
        assert result["problems"] == {}, method


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("a basis on the CPU", "tensors of cpu and cuda"),
        ("a generator of the CPU", "a generator of cpu on cuda"),
        ("a value is read", "_local_scalar_dense at optim/composite.py"),
    ],
)
def test_a_mistake_is_found(mistake: str, said: str) -> None:
    result = walked(["rso"], "--mistake", mistake, "--", "precision=bf16", "optimizer.state_dtype=bfloat16")[
        "rso"
    ]
    found = [str(result["failure"]), *result["problems"], *result["stages"]["step 2"]["syncs"]]
    assert any(said in each for each in found), found
