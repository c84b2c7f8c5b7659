"""The device's measured matrix-multiply rate: what model FLOPs are divided by for their utilisation."""

import statistics
import time

import torch


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
