"""Walk the GPU's path of methods with fake CUDA tensors: launches, host syncs, mixed devices, without a GPU.

    python tests/tools/gpu_path.py [--ranks N --strategy fsdp|hsdp|ddp] [--json FILE] [--ordinary] METHOD…
        [-- key=value …]

For each METHOD (an optimizer, or optimizer:sampler) a Trainer on fake CUDA tensors makes two steps and one in
which all bases are drawn anew, copies its state as a checkpoint does, loads it and makes another step; with
adam and rso an evaluation and a generation, too. The screen, or FILE as JSON, says for each of these what was
counted; with ``--ordinary`` for the update of a step without a refresh alone, which takes seconds for
a large model; with OPERATIONS=1 in the environment by operation, with TRACEBACK=1 an error has its traceback.
It needs g++, and some seconds to compile a guard once.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers import fake_cuda  # noqa: E402 (the paths first)

fake_cuda.load()

import torch  # noqa: E402 (after its devices)
from helpers.gpu_watch import GpuWatch  # noqa: E402
from helpers.runs import compose  # noqa: E402

from rsotrain.checkpoints.saving import copied_to_host  # noqa: E402
from rsotrain.instruments.phases import Phase, phase  # noqa: E402
from rsotrain.models.generation import generate_tokens  # noqa: E402
from rsotrain.optim import moments  # noqa: E402
from rsotrain.optim.rso import RSO  # noqa: E402
from rsotrain.parallel.sharding import local  # noqa: E402
from rsotrain.planner.fake_run import FakeRun  # noqa: E402
from rsotrain.subspace import seeding  # noqa: E402
from rsotrain.subspace.samplers import SampleRequest  # noqa: E402
from rsotrain.training.evaluation import evaluate  # noqa: E402
from rsotrain.training.refreshes import all_bases_due, groups_with_bases  # noqa: E402
from rsotrain.training.trainer import Trainer, no_signals  # noqa: E402

GPU = torch.device("cuda", 0)
TINY = ("model=llama_tiny", "tokenizer.vocab_size=300", "seq_len=16", "micro_batch_size=2")
OPTIMIZER = "optimizer step"


def walk(
    method: str, ranks: int, strategy: str, overrides: list[str], *, ordinary: bool = False
) -> dict[str, Any]:
    """What was counted by stage; ``failure``, where the walk ended early; ``problems``.

    ``ordinary``: see ``_ordinary_step``, which is then the only stage.
    """
    optimizer, _, sampler = method.partition(":")
    settings = [*TINY, f"batch_size={4 * ranks}", f"optimizer={optimizer}", *overrides]
    settings += [f"sampler={sampler}"] if sampler else []
    settings += [f"parallelism={strategy}"] if ranks > 1 else []
    settings += ["parallelism.shard_size=2"] if strategy == "hsdp" and ranks > 1 else []
    config = compose(settings)
    config = replace(config, parallelism=replace(config.parallelism, world_size=ranks))
    watch = GpuWatch()
    stages: dict[str, Any] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        watch.clear()
        try:
            yield
        finally:
            stages[name] = {
                "launches": dict(watch.launches),
                "syncs": dict(watch.syncs),
                "operations": {
                    name: n for (phase, name), n in watch.operations.items() if phase == OPTIMIZER
                },
            }

    failure = None
    try:
        with FakeRun(config, "cuda", GPU) as run, run.faking(), watch, watch.phases():
            if ordinary:
                _ordinary_step(run.trainer, stage)
            else:
                _walk(run.trainer, stage, watch, settings)
    except Exception as error:
        failure = f"{list(stages)[-1] if stages else 'build'}: {type(error).__name__}: {error}"
        if os.environ.get("TRACEBACK"):
            raise
    return {"stages": stages, "problems": dict(watch.problems), "failure": failure}


def _walk(trainer: Trainer, stage: Any, watch: GpuWatch, settings: list[str]) -> None:
    state = trainer.optimizer.state_dict()
    here = {**dict(trainer.model.named_parameters()), **{k: v for k, v in state.items() if k != "step"}}
    for name in (name for name, tensor in here.items() if not tensor.is_cuda):
        watch.problems[f"{name} is not on the GPU"] += 1
    for i in range(2):
        with stage(f"step {i + 1}"):
            trainer.train_step()
    if groups_with_bases(trainer):
        with stage("refresh"), all_bases_due(trainer):
            trainer.train_step()
    elif (costliest := trainer.optimizer.groups[0].costliest_step()) is not None:
        trainer.optimizer.steps_done = costliest - 1
        with stage("refresh"):
            trainer.train_step()
    if trainer.optimizer.groups[0].config.name in (
        "adam",
        "rso",
    ):  # one with the model's modules, one with its own
        _use(trainer, stage)
    with stage("copy"):
        weights = {name: local(p).detach() for name, p in trainer.model.named_parameters()}
        state = {"model": weights, "optimizer": trainer.optimizer.state_dict()}
        copied = {kind: {n: copied_to_host(t) for n, t in tensors.items()} for kind, tensors in state.items()}
        for name in (n for tensors in copied.values() for n, t in tensors.items() if t.is_cuda):
            watch.problems[f"{name} stays on the GPU"] += 1
    with stage("load"):
        trainer.optimizer.load_state_dict(copied["optimizer"])
        trainer._copy_weights(copied["model"])
    with stage("step after load"):
        trainer.train_step()


def _ordinary_step(trainer: Trainer, stage: Any) -> None:
    """The optimizer's part of step 2, as if all bases were there, with gradients that no pass has made."""
    optimizer = trainer.optimizer
    optimizer.steps_done = 1
    for holder in optimizer.gradient_holders():
        holder.grad = torch.empty_like(holder)
    for group in groups_with_bases(trainer):
        group.bases.waiting.clear()
    with stage("step 2"), phase(Phase.optimizer_step):
        trainer._finish_gradients(torch.zeros((), device=trainer.device), no_signals)
        optimizer.step()


def _use(trainer: Trainer, stage: Any) -> None:
    tokens = torch.zeros(2, trainer.config.seq_len, dtype=torch.int64)
    with stage("evaluation"):
        evaluate(
            trainer.model, iter([(tokens, tokens)] * trainer.world.size), trainer.world, bytes_per_token=1.0
        )
    with stage("generation"):
        generate = replace(trainer.config.generate, max_new_tokens=2)
        generate_tokens(
            trainer.model, [[1, 2], [3]], generate, eos_id=0, num_ids=300, max_context=16, device=GPU, seed=0
        )


def _basis_on_the_cpu() -> None:
    drawn = SampleRequest.normal
    setattr(SampleRequest, "normal", lambda self: drawn(self).cpu())  # noqa: B010


def _generator_of_the_cpu() -> None:
    setattr(moments, "generator", lambda *labels, device=None: seeding.generator(*labels))  # noqa: B010


def _value_is_read() -> None:
    update = RSO.update

    def reading(self: RSO, step: int, lr_factor: float) -> None:
        next(iter(self.state.values()))["basis"].sum().item()
        update(self, step, lr_factor)

    setattr(RSO, "update", reading)  # noqa: B010


MISTAKES = {
    "a basis on the CPU": _basis_on_the_cpu,
    "a generator of the CPU": _generator_of_the_cpu,
    "a value is read": _value_is_read,
}


def main() -> None:
    arguments, overrides = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, overrides = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--strategy", default="fsdp", choices=("fsdp", "hsdp", "ddp"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ordinary", action="store_true", help="count an ordinary step's update alone")
    parser.add_argument("--mistake", choices=MISTAKES, help="make one, which has to be found")
    options = parser.parse_args(arguments)
    if options.mistake:
        MISTAKES[options.mistake]()
    warnings.simplefilter("ignore")
    results = {
        m: walk(m, options.ranks, options.strategy, overrides, ordinary=options.ordinary)
        for m in options.methods
    }
    if options.json:
        options.json.write_text(json.dumps(results))
        return
    for method, result in results.items():
        print(f"{method}: {result['failure'] or 'ok'}")
        for problem, number in result["problems"].items():
            print(f"  {number} × {problem}")
        for name, counted in result["stages"].items():
            launches = ", ".join(f"{phase} {n}" for phase, n in counted["launches"].items())
            print(f"  {name}: {sum(counted['syncs'].values())} host syncs, launches: {launches}")
            for sync, number in counted["syncs"].items():
                print(f"    {number} × {sync}")
            if os.environ.get("OPERATIONS"):
                print("   ", dict(sorted(counted["operations"].items(), key=lambda x: -x[1])[:20]))


if __name__ == "__main__":
    main()
