"""Model FLOPs and the device's measured matrix-multiply rate: what model FLOPs utilisation divides."""

import statistics
import time

import torch

from rsotrain.config.schema import ModelConfig


def training_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations of forward and backward per token, matrix products only.

    6 per weight of a linear (2 forward, 4 backward), and causal attention's scores and values,
    6·s·d a layer (half of the full 12·s·d). The embedding look-up counts nothing.
    """
    d, ffn, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    linears = layers * (2 * d * d + 2 * d * model.kv_size + 3 * d * ffn) + vocab_size * d
    return 6 * linears + layers * 6 * seq_len * d


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of one large square matrix product on ``device``: median of five after two to warm up."""
    n = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # the global generator is not ours to advance
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])
