"""Time and memory of RSO's training step beside AdamW's, and beside Hugging Face's model.

    python tests/benchmark/rso_step.py [--model llama_130m] [--precision bf16] [--rounds 5] [--galore]

All in one process, in turn, medians; synthetic tokens, no activation checkpointing. A gathering step is one
that ends with a refresh of input-informed bases (sampler=svd): its time without the refresh itself, which is
given beside it. Saved activations exclude the head and the loss. Steps during which other programs used
the processor are not counted, and more are taken instead, up to four times as many.
"""

import argparse
import dataclasses
import os
import statistics
import time

import numpy as np
import torch
from bench import MAX_DISTURBANCE, MIB, configuration, other_processes_seconds, use_threads

from rsotrain.config.schema import Config
from rsotrain.instruments.memory import saved_activation_bytes, tensors_bytes
from rsotrain.models.subspace_linear import SubspaceLinear
from rsotrain.training.random_data import random_data
from rsotrain.training.trainer import Trainer

REST = "optimizer.update_proj_gap=1000000"  # no refresh but the first
VARIANTS = {
    "adam": ["optimizer=adam"],
    "rso, hidden/4": ["optimizer=rso", "optimizer.rank=0.25", REST],
    "rso, hidden/8": ["optimizer=rso", "optimizer.rank=0.125", REST],
    "rso, hidden/4, gathering": ["optimizer=rso", "optimizer.rank=0.25", "sampler=svd", REST],
}
GALORE = {"galore, hidden/4": ["optimizer=galore", "sampler=haar", "optimizer.rank=0.25", REST]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--precision", default="bf16_mixed", choices=["bf16", "bf16_mixed"])
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--max-disturbance",
        type=float,
        default=MAX_DISTURBANCE,
        help="others' processor seconds per second and core of a step that counts",
    )
    parser.add_argument("--galore", action="store_true", help="time GaLore too")
    parser.add_argument("--no-gathering", action="store_true", help="leave out the gathering step")
    return parser.parse_args()


def configured(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    shared = [
        f"model={arguments.model}", f"precision={arguments.precision}", f"seq_len={arguments.seq_len}",
        f"batch_size={arguments.batch_size}", f"model.vocab_size={arguments.vocab_size}",
    ]  # fmt: skip
    return configuration(*shared, *overrides)


def timed_step(trainer: Trainer, gathering: bool, max_disturbance: float) -> tuple[float, float, bool]:
    """(seconds of a step without its refreshes, seconds of the refreshes, was the machine calm?)."""

    def refreshes() -> float:
        return trainer.optimizer.metrics().get("subspace/refresh_seconds", 0.0)

    if gathering:
        trainer.optimizer.steps_done = 0  # step 1 gathers; the refreshes' clock goes on from round to round
    start, others_before, refreshing_before = time.perf_counter(), other_processes_seconds(), refreshes()
    trainer.train_step()
    seconds, others = time.perf_counter() - start, other_processes_seconds() - others_before
    refreshing = refreshes() - refreshing_before
    calm = others <= max_disturbance * seconds * (os.cpu_count() or 1)
    return seconds - refreshing, refreshing, calm


def trunk_bytes(trunk: torch.nn.Module, tokens: torch.Tensor) -> int:
    with saved_activation_bytes(trunk.parameters()) as saved:
        trunk(tokens)
    return saved.total


def huggingface_bytes(arguments: argparse.Namespace, config: Config, tokens: torch.Tensor) -> int:
    from transformers import LlamaConfig, LlamaModel

    fields = dataclasses.asdict(config.model) | {"vocab_size": arguments.vocab_size, "use_cache": False}
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    trunk = LlamaModel(LlamaConfig(**fields))
    if arguments.precision == "bf16":
        return trunk_bytes(trunk.to(torch.bfloat16), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        return trunk_bytes(trunk, tokens)


def block_gradient_bytes(trainer: Trainer) -> int:
    """Bytes of the gradients of attention and MLP weights, by the shapes of the tensors that receive them."""
    layers = [m for m in trainer.model.modules() if isinstance(m, SubspaceLinear)]
    if layers:
        return sum(layer.B.numel() * layer.B.element_size() for layer in layers)
    return tensors_bytes(trainer.optimizer.parameter_groups.blocks.values())


def main() -> None:
    arguments = parse_arguments()
    use_threads(arguments.threads)
    variants = VARIANTS | (GALORE if arguments.galore else {})
    if arguments.no_gathering:
        variants = {name: value for name, value in variants.items() if "gathering" not in name}
    configs = {name: configured(arguments, overrides) for name, overrides in variants.items()}
    data = random_data(configs["adam"])
    trainers = {name: Trainer(config, data) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    refreshes: dict[str, list[float]] = {name: [] for name in trainers}
    for round_index in range(4 * arguments.rounds + 2):  # the first two warm up
        for name, trainer in trainers.items():
            if len(seconds[name]) == arguments.rounds:
                continue
            step, refresh, calm = timed_step(trainer, "gathering" in name, arguments.max_disturbance)
            if round_index >= 2 and calm:
                seconds[name].append(step)
                refreshes[name].append(refresh)
    if not all(seconds.values()):
        raise SystemExit("Other programs disturbed every step of a variant; try again on a quieter machine.")
    tokens = data.train.batch(np.arange(arguments.batch_size))[0]
    plain = huggingface_bytes(arguments, configs["adam"], tokens)
    base = statistics.median(seconds["adam"])
    ordinary = statistics.median(seconds["rso, hidden/4"])
    print(
        f"{arguments.model}, {arguments.precision}, {arguments.batch_size} x {arguments.seq_len} tokens,"
        f" vocabulary {arguments.vocab_size}, {arguments.threads} threads, median of {arguments.rounds}"
    )
    columns = ("s/step", "fastest", "of adam", "saved MiB", "of HF", "block grads", "state MiB")
    print(f"{'':26}" + "".join(f"{column:>12}" for column in columns))
    for name, trainer in trainers.items():
        median, saved = statistics.median(seconds[name]), trunk_bytes(trainer.model.model, tokens)
        print(
            f"{name:26}{median:12.3f}{min(seconds[name]):12.3f}{median / base:12.3f}{saved / MIB:12.1f}"
            f"{saved / plain:12.3f}{block_gradient_bytes(trainer) / MIB:12.1f}"
            f"{trainer.optimizer.state_bytes() / MIB:12.1f}"
        )
        if "gathering" in name:
            refresh = statistics.median(refreshes[name])
            print(f"{'':26}{median / ordinary:.3f} ordinary steps, and {refresh:.2f} s for the refresh")
    print(f"saved by Hugging Face's trunk: {plain / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
