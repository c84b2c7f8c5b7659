"""The measured matrix-multiply rate of a device, relative to which the utilisation of FLOPs is reported."""

import statistics
import time

import torch


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on ``device``: median of five runs after two warm-up runs."""
    n = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # leaves the global generator as it is
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
