"""Between refreshes a step makes the host wait for the device once, where the loss is read."""

import warnings
from typing import Any

import pytest
import torch
from helpers.runs import EACH_OPTIMIZER, OPTIMIZERS, compose
from torch.utils._python_dispatch import TorchDispatchMode

from rsotrain.training.random_data import random_data
from rsotrain.training.trainer import Trainer

EVERY_STEP = (
    "osd",
    "ldadam",
)  # sample their bases in each step: on a CPU they ask whether gradients are zero
# methods and samplers whose refreshes take none, but for the first
BY_PRODUCTS = (
    "carry", "rso", "rso_pca", "apollo", "frugal", "ldadam", "osd", "galore", "fira", "sn_sm", "sumo",
    "galore sampler=randomized_svd",
)  # fmt: skip
SMALL = ["model=llama_tiny", "tokenizer.vocab_size=300", "seq_len=16", "batch_size=4", "micro_batch_size=2"]
PRECISIONS = ("bf16_mixed", "bf16")


class Reads(TorchDispatchMode):
    """Counts values of tensors that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def trainer(*overrides: str) -> Trainer:
    config = compose([*SMALL, *overrides])
    return Trainer(config, random_data(config))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", [each for each in EACH_OPTIMIZER if each.values[0] not in EVERY_STEP])
def test_no_value_is_read_within_a_step(optimizer: str, precision: str) -> None:
    """But of targets on the host: for each micro-batch how many there are, and whether some are ignored."""
    state = "int8" if precision == "bf16" else "float32"
    here = trainer(f"optimizer={optimizer}", f"precision={precision}", f"optimizer.state_dtype={state}")
    for _ in range(2):  # the first refreshes of all samplers
        here.train_step()
    with Reads() as reads:
        here.train_step()
    assert reads.number == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_host_waits_once_a_step(optimizer: str, compiled: str) -> None:
    here = trainer(f"optimizer={optimizer}", f"compile={compiled}", "device=cuda")
    for _ in range(3):
        here.train_step()
    assert len(waits := waits_of_a_step(here)) == 1, waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", BY_PRODUCTS)
def test_the_host_waits_once_in_a_step_with_refreshes(method: str) -> None:
    from rsotrain.training.refreshes import all_bases_due

    here = trainer(*f"optimizer={method}".split(), "device=cuda")
    for _ in range(3):
        here.train_step()
    with all_bases_due(here):
        assert len(waits := waits_of_a_step(here)) == 1, waits


def waits_of_a_step(here: Trainer) -> list[str]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            here.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_device_is_timed_by_phase() -> None:
    from rsotrain.benchmark import PHASES, REFRESH
    from rsotrain.benchmark.phases import PhaseClock, attach
    from rsotrain.training.refreshes import all_bases_due

    here = trainer("optimizer=rso_pca", "device=cuda")
    clock = PhaseClock(here.device)
    attach(clock, here)
    here.train_step()
    with all_bases_due(here):
        seconds = clock.step(here.train_step)
    assert all(seconds[phase] > 0 for phase in PHASES)
    assert seconds[REFRESH] < sum(seconds.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned() -> None:
    here = trainer("device=cuda")
    assert all(tensor.is_pinned() for batch in here.micro_batches() for tensor in batch)
