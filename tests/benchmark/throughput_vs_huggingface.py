"""Training throughput beside plain Hugging Face LlamaForCausalLM + torch.optim.AdamW, on CPU.

Both loops run in processes of their own, in turn, for several rounds; the table gives medians.

    python tests/benchmark/throughput_vs_huggingface.py --precision bf16 --model llama_60m

``--variants`` chooses among huggingface, rsotrain, and either with the allocator settings that the
rsotrain command starts with (``…+allocator``) or torch's huge pages (``…+thp``), or both.

On a shared machine other programs disturb the clock. Steps during which they used more than 3 % of the
processor are not counted, and a process goes on until it has enough others (at most four times as many).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL_FOLDER = ROOT / "conf" / "model"
LOOPS = ("huggingface", "rsotrain")
WARM_UP_STEPS = 6  # the heap still grows during the first
MAX_DISTURBANCE = 0.03  # others' processor seconds per second and core


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llama_60m", choices=sorted(p.stem for p in MODEL_FOLDER.glob("*.yaml"))
    )
    parser.add_argument("--optimizer", default="adam", help="rsotrain's; Hugging Face's loop has AdamW")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "bf16_mixed", "fp32"])
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--activation-checkpointing", default="none", choices=["none", "mlp", "block"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument(
        "--variants", default="huggingface,rsotrain+allocator", help="the first is the reference"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for variant in arguments.variants.split(","):
        loop, *settings = variant.split("+")
        if loop not in LOOPS or not set(settings) <= {"allocator", "thp"}:
            parser.error(f"unknown variant {variant!r}")
    return arguments


def model_config(arguments: argparse.Namespace) -> Any:
    from omegaconf import OmegaConf

    from rsotrain.config import ModelConfig

    file = OmegaConf.load(MODEL_FOLDER / f"{arguments.model}.yaml")
    del file["defaults"]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), file))


def huggingface_step(arguments: argparse.Namespace, tokens: Any) -> Callable[[], float]:
    """The loop of a model card: loss = model(labels=…), backward, AdamW with its defaults."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = dataclasses.asdict(model_config(arguments)) | {
        "vocab_size": arguments.vocab_size,
        "use_cache": False,
    }
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    model = LlamaForCausalLM(LlamaConfig(**fields))
    if arguments.precision == "bf16":
        model.to(torch.bfloat16)
    if arguments.activation_checkpointing == "block":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16_mixed"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def rsotrain_step(arguments: argparse.Namespace, tokens: Any) -> Callable[[], float]:
    """The Trainer's own step, as the command runs it: gradient norm, finite check, schedule and all."""
    from types import SimpleNamespace

    import numpy as np
    from hydra import compose, initialize_config_dir

    from rsotrain.cli import conf_dir, register_schemas, to_config
    from rsotrain.data.build import Data
    from rsotrain.data.sequences import PackedSequences
    from rsotrain.trainer import Trainer

    register_schemas()
    overrides = [
        f"model={arguments.model}", f"optimizer={arguments.optimizer}", f"precision={arguments.precision}",
        f"seq_len={arguments.seq_len}", f"batch_size={arguments.batch_size}", "steps=10000",
        f"activation_checkpointing={arguments.activation_checkpointing}",
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = to_config(compose("config", overrides))
    stream = np.append(tokens.numpy().ravel(), 0).astype(np.uint16)
    sequences = PackedSequences(
        stream, arguments.seq_len, num_bytes=len(stream), vocab_size=arguments.vocab_size
    )
    tokenizer: Any = SimpleNamespace(vocab_size=arguments.vocab_size)
    trainer = Trainer(config, Data(tokenizer, sequences, sequences, fingerprint=""))
    return lambda: trainer.train_step().loss


def worker(arguments: argparse.Namespace) -> None:
    """Run one loop and print its step times and peak resident memory as JSON."""
    loop, *settings = arguments.worker.split("+")
    if "thp" in settings:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it at its first allocation
    if "allocator" in settings:
        from rsotrain.allocator import keep_freed_memory

        if not keep_freed_memory():
            raise SystemExit("The allocator settings need Linux with glibc; leave out +allocator.")
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tokens = torch.randint(arguments.vocab_size, (arguments.batch_size, arguments.seq_len))
    step = {"huggingface": huggingface_step, "rsotrain": rsotrain_step}[loop](arguments, tokens)
    losses = [step() for _ in range(WARM_UP_STEPS)]
    seconds, disturbed = [], []
    while len(seconds) < arguments.steps and len(losses) < WARM_UP_STEPS + 4 * arguments.steps:
        start, others_before = time.perf_counter(), other_processes_seconds()
        losses.append(step())
        elapsed, others = time.perf_counter() - start, other_processes_seconds() - others_before
        calm = others <= MAX_DISTURBANCE * elapsed * (os.cpu_count() or 1)
        (seconds if calm else disturbed).append(elapsed)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss = losses[WARM_UP_STEPS]  # after as many updates in every process
    print(json.dumps({"seconds": seconds, "disturbed": disturbed, "peak_bytes": peak_bytes, "loss": loss}))


def other_processes_seconds() -> float:
    """Processor seconds that the machine spent on anything but this process, since it started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


def measurements(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    for round_index in range(arguments.rounds):
        for variant in arguments.variants.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant]
            output = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout
            result = json.loads(output.splitlines()[-1])
            text = ", ".join(f"{value:.3f}" for value in result["seconds"])
            line = f"round {round_index + 1} {variant}: {text} s; {len(result['disturbed'])} steps disturbed"
            print(line, file=sys.stderr, flush=True)
            yield variant, result


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        worker(arguments)
        return
    seconds: dict[str, list[float]] = {}
    peak_bytes: dict[str, int] = {}
    losses: dict[str, float] = {}
    for variant, result in measurements(arguments):
        seconds.setdefault(variant, []).extend(result["seconds"])
        peak_bytes[variant] = max(peak_bytes.get(variant, 0), result["peak_bytes"])
        losses[variant] = result["loss"]
    if not all(seconds.values()):
        raise SystemExit("Other programs disturbed every step of a variant; try again on a quieter machine.")
    tokens = arguments.batch_size * arguments.seq_len
    reference = statistics.median(next(iter(seconds.values())))
    print(
        f"{arguments.model}, {arguments.precision}, {arguments.batch_size} x {arguments.seq_len} tokens,"
        f" vocabulary {arguments.vocab_size}, checkpointing {arguments.activation_checkpointing},"
        f" {arguments.threads} threads, {arguments.rounds} rounds of {arguments.steps} steps"
    )
    print(f"{'':32}{'s/step':>9}{'fastest':>9}{'tokens/s':>10}{'speed':>8}{'peak MiB':>10}{'loss':>9}")
    for variant, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{variant:32}{median:9.3f}{min(values):9.3f}{tokens / median:10.0f}{reference / median:7.2f}x"
            f"{peak_bytes[variant] / 2**20:10.0f}{losses[variant]:9.3f}"
        )


if __name__ == "__main__":
    main()
