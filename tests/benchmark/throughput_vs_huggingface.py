"""Training throughput and memory beside the stack that GaLore's and its successors' scripts are, on CPU.

    python tests/benchmark/throughput_vs_huggingface.py                       # all of the bars
    python tests/benchmark/throughput_vs_huggingface.py --variants huggingface:adamw,rsotrain:adam

That stack is transformers.LlamaForCausalLM with torch.optim.AdamW (huggingface:adamw) or galore_torch's
GaLoreAdamW (huggingface:galore), called as their training loop does: attention mask, labels, backward, step,
zero_grad. rsotrain:<optimizer> is the whole Trainer.train_step, as the command runs it, and
rsotrain:<optimizer>:compile the same with compile=true. Each loop runs in a process of its own, in turn, for
several rounds; refreshes are amortised over --gap steps: what the first step's SVDs, or the refresh of all
bases, take more than another step, is divided by it. For huggingface:galore that is measured in the first
round; in the others its bases are random. Peak memory is the process's; page faults, and the processor's time
in the kernel that they mostly are, those of the last round.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench import MIB, ROOT, Figure, build_trainer, calm, configuration, galore_torch_module, report, timed

WARM_UP_STEPS = 4  # the heap still grows during the first
VARIANTS = (
    "huggingface:adamw,rsotrain:adam,rsotrain:adam:compile,"
    "huggingface:galore,rsotrain:galore,rsotrain:galore:compile,rsotrain:rso,rsotrain:rso:compile"
)
# of ours, compiled or not: theirs, least ratio of tokens/s
BARS = {
    "rsotrain:adam": ("huggingface:adamw", 1.3),
    "rsotrain:galore": ("huggingface:galore", 1.5),
    "rsotrain:rso": ("huggingface:galore", 1.7),
}
COMPILED = ":compile"
MEMORY_BAR = 0.6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "bf16_mixed", "fp32"])
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=float, default=0.25, help="of the hidden size")
    parser.add_argument("--gap", type=int, default=200, help="update_proj_gap")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    parser.add_argument("--random-bases", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def overrides(arguments: argparse.Namespace, optimizer: str) -> list[str]:
    low_rank = [f"optimizer.rank={arguments.rank}", f"optimizer.update_proj_gap={arguments.gap}"]
    return [
        f"model={arguments.model}", f"optimizer={optimizer}", f"precision={arguments.precision}",
        f"seq_len={arguments.seq_len}", f"batch_size={arguments.batch_size}",
        f"model.vocab_size={arguments.vocab_size}", f"device={arguments.device}",
        *(low_rank if optimizer not in ("adam", "muon", "sn") else []),
    ]  # fmt: skip


class HuggingFaceLoop:
    """The loop of GaLore's torchrun_main.py, or of a model card, around LlamaForCausalLM."""

    def __init__(self, arguments: argparse.Namespace, optimizer: str) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = configuration(*overrides(arguments, "adam"))
        fields = dataclasses.asdict(config.model) | {"use_cache": False}
        fields["num_key_value_heads"] = config.model.kv_heads
        self.model = LlamaForCausalLM(LlamaConfig(**fields))
        self.mixed = arguments.precision == "bf16_mixed"
        if arguments.precision == "bf16":
            self.model.to(torch.bfloat16)
        self.device = torch.device(arguments.device)
        self.model.to(self.device)
        shape = (arguments.batch_size, arguments.seq_len)
        self.tokens = torch.randint(arguments.vocab_size, shape, device=self.device)
        self.low_rank = optimizer == "galore"
        if optimizer == "adamw":
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            self.optimizer = self._galore(arguments)

    def _galore(self, arguments: argparse.Namespace) -> Any:
        if arguments.random_bases:
            galore_torch_module("galore_projector").GaLoreProjector.get_orthogonal_matrix = random_basis
        blocks = [p for n, p in self.model.named_parameters() if ("attn" in n or "mlp" in n) and p.ndim == 2]
        claimed = {id(p) for p in blocks}
        low_rank = {
            "params": blocks, "rank": int(arguments.rank * min(blocks[0].shape)),
            "update_proj_gap": arguments.gap, "scale": 0.25, "proj_type": "std",
        }  # fmt: skip
        rest = {"params": [p for p in self.model.parameters() if id(p) not in claimed]}
        kind = galore_torch_module("adamw").AdamW  # what the package exports as GaLoreAdamW
        return kind([rest, low_rank], lr=1e-3, weight_decay=0.0, no_deprecation_warning=True)

    def step(self) -> float:
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            batch = {"input_ids": self.tokens, "attention_mask": torch.ones_like(self.tokens)}
            loss = self.model(**batch, labels=self.tokens.clone()).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def refresh_seconds(self, first: float, ordinary: float) -> float:
        """The SVDs of the first step, and the page faults of its states."""
        return max(0.0, first - ordinary) if self.low_rank else 0.0


def random_basis(self: object, weights: Any, rank: int, type: str) -> Any:
    """In the place of an SVD."""
    import torch

    random = torch.randn(min(weights.shape), rank, device=weights.device)
    basis = torch.linalg.qr(random)[0].to(weights.dtype)
    return basis.T.contiguous() if type == "right" else basis


class OurLoop:
    """The Trainer's own step: gradient norm, finite check, schedule and all."""

    def __init__(self, arguments: argparse.Namespace, optimizer: str) -> None:
        name = optimizer.removesuffix(COMPILED)
        compiled = ["compile=true"] if name != optimizer else []
        self.trainer = build_trainer(*overrides(arguments, name), *compiled)

    def step(self) -> float:
        return self.trainer.train_step().loss

    def refresh_seconds(self, first: float, ordinary: float) -> float:
        from rsotrain.benchmark import REFRESH
        from rsotrain.benchmark.phases import PhaseClock, attach
        from rsotrain.training.refreshes import all_bases_due, groups_with_bases

        if not groups_with_bases(self.trainer):
            return 0.0
        clock = PhaseClock(self.trainer.device)
        attach(clock, self.trainer)
        with all_bases_due(self.trainer):
            return clock.step(self.trainer.train_step)[REFRESH]


LOOPS: dict[str, Callable[[argparse.Namespace, str], HuggingFaceLoop | OurLoop]] = {
    "huggingface": HuggingFaceLoop,
    "rsotrain": OurLoop,
}


def worker(arguments: argparse.Namespace) -> None:
    """Run one loop and print its step times, refresh time and peak resident memory as JSON."""
    kind, _, optimizer = arguments.worker.partition(":")
    if kind == "rsotrain":  # as the command begins
        from rsotrain.running.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    from rsotrain.tracking.metrics import peak_resident_bytes

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    loop = LOOPS[kind](arguments, optimizer)
    first = timed(loop.step)
    losses = [first.value] + [loop.step() for _ in range(WARM_UP_STEPS - 1)]
    before = resource.getrusage(resource.RUSAGE_SELF)
    laps = [timed(loop.step)]
    while len(laps) < 3 * arguments.steps and len(calm(laps, 0)) < arguments.steps:
        laps.append(timed(loop.step))
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = [lap.seconds for lap in calm(laps, arguments.steps)]
    result = {
        "seconds": seconds,
        "refresh": loop.refresh_seconds(first.seconds, statistics.median(seconds)),
        "faults": (after.ru_minflt - before.ru_minflt) / len(laps),
        "kernel_seconds": (after.ru_stime - before.ru_stime) / len(laps),
        "peak_bytes": peak_resident_bytes(),
        "loss": losses[-1],
    }
    print(json.dumps(result))


def measurements(arguments: argparse.Namespace) -> Iterator[tuple[int, str, dict[str, Any]]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    for round_index in range(arguments.rounds):
        for variant in arguments.variants.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant]
            command += ["--random-bases"] if round_index else []
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(output.stdout.splitlines()[-1])
            text = ", ".join(f"{value:.3f}" for value in result["seconds"])
            print(f"round {round_index + 1} {variant}: {text} s", file=sys.stderr, flush=True)
            yield round_index, variant, result


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        worker(arguments)
        return
    seconds: dict[str, list[float]] = {}
    refresh: dict[str, float] = {}
    peaks: dict[str, int] = {}
    last: dict[str, dict[str, Any]] = {}
    for round_index, variant, result in measurements(arguments):
        seconds.setdefault(variant, []).extend(result["seconds"])
        peaks[variant] = max(peaks.get(variant, 0), result["peak_bytes"])
        last[variant] = result
        if round_index == 0:
            refresh[variant] = result["refresh"]
    step = {v: statistics.median(values) + refresh[v] / arguments.gap for v, values in seconds.items()}
    tokens = arguments.batch_size * arguments.seq_len
    figures = []
    for variant, values in seconds.items():
        detail = (
            f"{tokens / step[variant]:.0f} tokens/s; fastest {min(values):.3f} s,"
            f" refresh {refresh[variant]:.1f} s, peak {peaks[variant] / MIB:.0f} MiB;"
            f" a step has {last[variant]['faults']:.0f} page faults and {last[variant]['kernel_seconds']:.2f}"
            " processor seconds in the kernel"
        )
        figures.append(Figure("step", variant, step[variant], unit=" s", detail=detail))
    for ours in step:
        theirs, least = BARS.get(ours.removesuffix(COMPILED), ("", 0.0))
        if theirs in step:
            ratio, share = step[theirs] / step[ours], peaks[ours] / peaks[theirs]
            figures.append(Figure(f"tokens/s, of {theirs}", ours, ratio, least))
            figures.append(Figure(f"peak memory, of {theirs}", ours, share, MEMORY_BAR, at_least=False))
    conditions = (
        f"{arguments.model}, {arguments.precision}, {arguments.batch_size} x {arguments.seq_len} tokens,"
        f" vocabulary {arguments.vocab_size}, rank {arguments.rank:g} of the hidden size, refresh every"
        f" {arguments.gap} steps, {arguments.threads} threads"
    )
    report(f"throughput_{arguments.model}_{arguments.precision}", conditions, figures)


if __name__ == "__main__":
    main()
