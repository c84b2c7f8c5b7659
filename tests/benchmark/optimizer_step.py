"""Time of one optimizer step without refresh on a LLaMA's shapes: ours, torch's and galore-torch's.

    python tests/benchmark/optimizer_step.py [--model llama_130m] [--rounds 5] [--methods galore adam]

Alternating rounds, medians, float32 weights and gradients. ``galore`` projects in float32,
``galore (bf16 products)`` is what precision=bf16_mixed runs. Needs galore-torch for the comparison.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench import galore_torch_module
from torch import nn

from rsotrain.config.choices import StateDtype
from rsotrain.config.methods import (
    AdamConfig,
    ApolloConfig,
    FiraConfig,
    FrugalConfig,
    GaLoreConfig,
    MuonConfig,
    OptimizerConfig,
    SNConfig,
    SNSMConfig,
)
from rsotrain.config.samplers import HaarConfig, NoSamplerConfig, OnlinePCAConfig, SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.optim.build import build_optimizer

VOCAB, RANK, GAP = 32000, 0.25, 10**9
MODELS = {"llama_60m": (512, 1376, 8), "llama_130m": (768, 2048, 12), "llama_350m": (1024, 2736, 24)}
LOW = {"rank": RANK, "update_proj_gap": GAP}
METHODS: dict[str, tuple[OptimizerConfig, SamplerConfig, Precision]] = {
    "adam": (AdamConfig("adam", 1e-3), NoSamplerConfig("none"), Precision.fp32),
    "galore": (GaLoreConfig("galore", 1e-3, **LOW), HaarConfig("haar"), Precision.fp32),
    "galore (bf16 products)": (
        GaLoreConfig("galore", 1e-3, **LOW),
        HaarConfig("haar"),
        Precision.bf16_mixed,
    ),
    "osd (bf16 products)": (
        GaLoreConfig("osd", 1e-3, rank=RANK, update_proj_gap=1),
        OnlinePCAConfig("online_pca"),
        Precision.bf16_mixed,
    ),
    "sn": (SNConfig("sn", 1e-3), NoSamplerConfig("none"), Precision.fp32),
    "sn_sm (bf16 products)": (
        SNSMConfig("sn_sm", 1e-3, **LOW),
        HaarConfig("haar"),
        Precision.bf16_mixed,
    ),
    "fira (bf16 products)": (FiraConfig("fira", 1e-3, **LOW), HaarConfig("haar"), Precision.bf16_mixed),
    "apollo (bf16 products)": (
        ApolloConfig("apollo", 1e-3, **LOW),
        HaarConfig("haar"),
        Precision.bf16_mixed,
    ),
    "frugal": (FrugalConfig("frugal", 1e-3, **LOW), HaarConfig("haar"), Precision.bf16_mixed),
    "muon": (MuonConfig("muon", 1e-3), NoSamplerConfig("none"), Precision.fp32),
    "adam (bf16 weights)": (AdamConfig("adam", 1e-3), NoSamplerConfig("none"), Precision.bf16),
    "adam (bf16 state)": (
        AdamConfig("adam", 1e-3, state_dtype=StateDtype.bfloat16),
        NoSamplerConfig("none"),
        Precision.fp32,
    ),
}


def parameters(name: str, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Weights with gradients, named as in the model."""
    hidden, ffn, layers = MODELS[name]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCAB, hidden), "head.weight": (VOCAB, hidden)}
    for layer in range(layers):
        for x in "qkvo":
            shapes[f"layers.{layer}.self_attn.{x}_proj.weight"] = (hidden, hidden)
        for x in ("gate", "up"):
            shapes[f"layers.{layer}.mlp.{x}_proj.weight"] = (ffn, hidden)
        shapes[f"layers.{layer}.mlp.down_proj.weight"] = (hidden, ffn)
    result = {}
    for key, shape in shapes.items():
        result[key] = nn.Parameter((torch.randn(shape) * 0.02).to(dtype))
        result[key].grad = torch.randn(shape).to(dtype)
    return result


def galore_torch_step(named: dict[str, nn.Parameter]) -> Callable[[], object]:
    """One step of galore_torch.GaLoreAdamW; random bases instead of its first, slow SVDs."""
    module, projector = galore_torch_module("adamw"), galore_torch_module("galore_projector")

    def random_basis(self: object, weights: torch.Tensor, rank: int, type: str) -> torch.Tensor:
        basis = torch.linalg.qr(torch.randn(min(weights.shape), rank))[0]
        return basis.T.contiguous() if type == "right" else basis

    projector.GaLoreProjector.get_orthogonal_matrix = random_basis
    blocks = [p for name, p in named.items() if "layers" in name]
    rest = [p for name, p in named.items() if "layers" not in name]
    rank = int(RANK * min(blocks[0].shape))
    galore = {"params": blocks, "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    return module.AdamW([{"params": rest}, galore], lr=1e-3, no_deprecation_warning=True).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama_130m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    narrow = parameters(arguments.model, torch.bfloat16)
    wide = parameters(arguments.model, torch.float32)
    steps: dict[str, Callable[[], object]] = {"galore_torch.GaLoreAdamW": galore_torch_step(wide)}
    torch_adamw = torch.optim.AdamW(wide.values(), lr=1e-3, fused=True)
    steps["torch.optim.AdamW(fused)"] = torch_adamw.step
    for name in arguments.methods:
        config, sampler, precision = METHODS[name]
        named = narrow if precision is Precision.bf16 else wide
        built = build_optimizer(named.items(), config, sampler, precision=precision, seed=0, total_steps=GAP)
        steps[name] = built.step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(arguments.rounds + 1):  # the first warms up, and samples the bases
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_index:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["galore_torch.GaLoreAdamW"])
    print(f"{arguments.model}, rank hidden/4, {arguments.threads} threads, median of {arguments.rounds}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:28s} {median * 1000:8.1f} ms   {median / base:5.2f} of galore_torch")


if __name__ == "__main__":
    main()
