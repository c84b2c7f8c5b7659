"""What one GPU has to show: the CPU's numbers, one copy a step, flash attention, planned memory, its speed.

``make test-gpu`` runs these and writes a report; without a GPU it walks them on the CPU with small models,
and what only a GPU can show is then measured but not asserted.
"""

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.command import ROOT
from helpers.gpu_settings import HERE, needs_a_gpu
from helpers.runs import compose

from rsotrain.checkpoints.files import read_checkpoint
from rsotrain.checkpoints.saving import BackgroundSaver
from rsotrain.instruments.phases import watching
from rsotrain.instruments.work import WorkCounter
from rsotrain.models.architecture import flops_per_token
from rsotrain.models.build import model_without_memory
from rsotrain.planner.fake_run import FakeRun
from rsotrain.planner.plan import make_plan
from rsotrain.planner.tracker import Kind, MemoryTracker
from rsotrain.subspace.bases import Bases
from rsotrain.training.flops import matmul_flops_per_second
from rsotrain.training.random_data import random_data
from rsotrain.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, needs_a_gpu]

Note = Callable[[str, object], None]
SMALL = ("model=llama_tiny", "tokenizer.vocab_size=300", "seq_len=64", "batch_size=4", "micro_batch_size=2")
# Sums in another order: of llama_tiny in float32 after four updates with Adam's signs of small gradients.
LOSS, NORM = 2e-4, 2e-2


def trainer(*overrides: str, device: str = HERE.device) -> Trainer:
    config = compose([*SMALL, "compile=false", *overrides, f"device={device}"])
    return Trainer(config, random_data(config))


def of(optimizer: str) -> list[str]:
    """Overrides with which four steps have a refresh, where there are refreshes."""
    has_bases = hasattr(compose([f"optimizer={optimizer}"]).optimizer, "update_proj_gap")
    return [f"optimizer={optimizer}", *(["optimizer.update_proj_gap=3"] if has_bases else [])]


def losses(here: Trainer, steps: int = 4) -> list[float]:
    return [here.train_step().loss for _ in range(steps)]


def gap(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(autouse=True)
def _memory_is_free() -> Iterator[None]:
    yield
    gc.collect()
    if not HERE.dry:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("optimizer", HERE.optimizers)
def test_float32_is_the_cpus(optimizer: str, monkeypatch: pytest.MonkeyPatch, record_property: Note) -> None:
    here = trainer(*of(optimizer), "precision=fp32")
    results = [here.train_step() for _ in range(4)]
    if not HERE.dry:  # the complement of a seed counts normal numbers, as a GPU does
        drawn = Bases._seed_of
        monkeypatch.setattr(Bases, "_seed_of", lambda *given: ~drawn(*given))
    there = trainer(*of(optimizer), "precision=fp32", device="cpu")
    expected = [there.train_step() for _ in range(4)]
    loss = gap([r.loss for r in results], [r.loss for r in expected])
    norm = gap([r.grad_norm for r in results], [r.grad_norm for r in expected])
    record_property("loss", loss)
    record_property("gradient norm", norm)
    assert loss < LOSS
    assert norm < NORM


@pytest.mark.parametrize("optimizer", HERE.compiled)
def test_compiled_is_eager(optimizer: str, monkeypatch: pytest.MonkeyPatch, record_property: Note) -> None:
    if HERE.dry:  # traced, and nothing generated
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **({"backend": "eager"} | k)))
    torch.compiler.reset()
    eager = losses(trainer(*of(optimizer), "precision=fp32"))
    compiled = losses(trainer(*of(optimizer), "precision=fp32", "compile=true"))
    record_property("loss", gap(compiled, eager))
    assert gap(compiled, eager) < LOSS


@pytest.mark.parametrize("state", ["bfloat16", "int8"])
@pytest.mark.parametrize("optimizer", HERE.optimizers)
def test_states_of_fewer_bits(optimizer: str, state: str, record_property: Note) -> None:
    """bfloat16 weights and activations, too: 2⁻⁸ a number, of four losses that hardly move."""
    wide = losses(trainer(*of(optimizer), "precision=fp32"))
    narrow = losses(trainer(*of(optimizer), "precision=bf16", f"optimizer.state_dtype={state}"))
    record_property("loss", gap(narrow, wide))
    assert gap(narrow, wide) < 3e-2


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_documents_are_those_of_the_mask(checkpointing: str, record_property: Note) -> None:
    masked = ["optimizer=adam", "data.document_mask=true", f"activation_checkpointing={checkpointing}"]
    here, there = trainer(*masked), trainer(*masked, "precision=fp32", device="cpu")
    by_documents = here.model.model.documents(torch.zeros(1, 4, dtype=torch.int64), here.device) is not None
    record_property("by documents", by_documents)
    found = gap(losses(here), losses(there))
    record_property("loss", found)
    assert found < 1e-2  # of bfloat16 activations
    if not HERE.dry and torch.cuda.get_device_capability() >= (8, 0):
        assert by_documents


@pytest.mark.parametrize("optimizer", HERE.optimizers)
def test_a_checkpoint_goes_on(optimizer: str, tmp_path: Path, record_property: Note) -> None:
    """While it is written training goes on, and what is written is of the step before."""
    here = trainer(*of(optimizer))
    losses(here, 3)
    saver, state = BackgroundSaver(tmp_path, here.world, 2), here.state_dict()
    record = {
        **state["trainer"],
        "run": {"data": "", "seconds": 0, "validation": {}, "record": {}},
        "score": None,
    }
    here.before_update = saver.let_copies_end
    saver.start(here.step, state, here.shards(), record)
    went_on = losses(here, 3)
    assert saver.wait() is None
    again = trainer(*of(optimizer))
    again.load_state_dict(read_checkpoint(tmp_path / "step_00000003", again.shards(), again.world)[0])
    found = gap(losses(again, 3), went_on)
    record_property("loss", found)
    record_property("bitwise", found == 0)
    assert found < 1e-4
    assert found == 0 or not HERE.dry


@pytest.mark.parametrize("optimizer", HERE.optimizers)
def test_a_step_copies_once_to_the_host_and_launches_what_is_planned(
    optimizer: str, record_property: Note
) -> None:
    from torch.profiler import ProfilerActivity, profile

    here = trainer(f"optimizer={optimizer}")
    losses(here, 3)
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 if HERE.dry else 2]
    ) as profiled:
        losses(here, 2)
    events = profiled.events() or []
    on_device = [e.name for e in events if e.device_type is torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset"))]
    copies = sum("DtoH" in name for name in on_device) / 2
    flash = sum("flash" in name.lower() for name in kernels) / 2
    with FakeRun(here.config, "cuda") as run:
        run.step(4, counter := WorkCounter())
    planned = sum(n * o.launches for work in counter.of_step(2).values() for o, n in work.items())
    for name, value in (
        ("copies", copies), ("kernels", len(kernels) / 2), ("planned", planned), ("flash", flash),
    ):  # fmt: skip
        record_property(name, value)
    assert planned > 0
    if not HERE.dry:
        if optimizer not in ("osd", "ldadam"):  # which draw all bases in each step
            assert copies == 1
            assert len(kernels) / 2 <= 1.1 * planned
        assert flash > 0


@pytest.mark.parametrize("optimizer", HERE.few)
def test_memory_does_not_grow(optimizer: str, record_property: Note) -> None:
    here = trainer(*of(optimizer))
    losses(here, min(41, HERE.growth_steps))
    before = 0 if HERE.dry else torch.cuda.memory_allocated()
    losses(here, HERE.growth_steps)
    grown = 0 if HERE.dry else torch.cuda.memory_allocated() - before
    record_property("grown bytes", grown)
    assert grown < 2**20


@pytest.mark.parametrize("given", HERE.peaks, ids=" ".join)
def test_the_planned_peak_is_the_measured_one(given: tuple[str, ...], record_property: Note) -> None:
    sizes = ["tokenizer.vocab_size=32000", "seq_len=1024", "batch_size=8", "micro_batch_size=8"]
    small = ["tokenizer.vocab_size=300", "seq_len=64", "batch_size=4", "micro_batch_size=4"]
    config = compose([*(small if HERE.dry else sizes), "compile=false", f"device={HERE.device}", *given])
    planned = make_plan(config, gpus=False).peak
    if HERE.dry:
        here, tracker = Trainer(config, random_data(config)), MemoryTracker()
        here.saved_activations_bytes = 0
        with tracker:
            tracker.mark(here.model.parameters(), Kind.parameters)
            tracker.mark(here.optimizer.state_tensors(), Kind.optimizer_state)
            with watching(tracker.phase):
                losses(here)
        measured = max(peak.total for peak in tracker.peaks().values())
    else:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        losses(Trainer(config, random_data(config)))
        measured = torch.cuda.max_memory_allocated() - before
    record_property("planned bytes", planned)
    record_property("measured bytes", measured)
    assert planned == pytest.approx(measured, rel=0.05)


def _timed(loop: object, steps: int) -> tuple[float, float, float]:
    """(seconds of a step, of the refresh of all bases, of the first step)."""

    def seconds(number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            loop.step()  # type: ignore[attr-defined]  # reads the loss, and so waits
        return (time.perf_counter() - begin) / number

    first = seconds(1)
    seconds(2)
    step = seconds(steps)
    return step, loop.refresh_seconds(first, step), first  # type: ignore[attr-defined]


NEEDS = {"huggingface:adamw": ("transformers",), "huggingface:galore": ("transformers", "galore_torch")}
LOOPS = [*(f"rsotrain:{optimizer}" for optimizer in HERE.few), *(NEEDS if HERE.with_huggingface else ())]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("model", HERE.speed_models)
def test_speed(model: str, loop: str, record_property: Note) -> None:
    """tokens/s with the refresh as its average over 200 steps, MFU of the measured rate, peak memory."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmark"))
    try:
        from throughput_vs_huggingface import LOOPS as KINDS
    finally:
        sys.path.pop(0)
    kind, _, optimizer = loop.partition(":")
    for package in NEEDS.get(loop, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    numbers = dict(override.split("=") for override in HERE.speed_overrides)
    arguments = argparse.Namespace(
        model=model, precision="bf16", vocab_size=300 if HERE.dry else 32000, rank=0.25, gap=200,
        seq_len=int(numbers["seq_len"]), batch_size=int(numbers["batch_size"]), device=HERE.device,
        random_bases=True,
    )  # fmt: skip
    if not HERE.dry:
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    name = optimizer if HERE.dry or kind == "huggingface" else f"{optimizer}:compile"
    timed = KINDS[kind](arguments, name)
    step, refresh, first = _timed(timed, 2 if HERE.dry else 5)
    seconds = step + (refresh / arguments.gap if kind == "rsotrain" else 0.0)
    tokens = arguments.seq_len * arguments.batch_size
    config = compose([f"model={model}"])
    per_token = flops_per_token(model_without_memory(config.model, arguments.vocab_size), arguments.seq_len)
    rate = matmul_flops_per_second(torch.device(HERE.device), torch.bfloat16)
    record_property("tokens/s", tokens / seconds)
    record_property("first step seconds", first)
    record_property("refresh seconds", refresh if kind == "rsotrain" else "random bases, no SVD")
    record_property("MFU", tokens / seconds * per_token / rate)
    if not HERE.dry:
        record_property("peak bytes", torch.cuda.max_memory_allocated())
    assert seconds > 0
