"""One matrix "w" and gradients for it, to hold an optimizer against a transcription of its paper."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.samplers import SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer

Transcription = Callable[[Tensor, list[Tensor]], Tensor]
STEPS, RANK, GAP, LR = 20, 4, 7, 0.01
BETAS, EPS = (0.9, 0.99), 1e-8
SHAPES = {"right": (24, 10), "left": (10, 24), "square": (12, 12)}
PRECISIONS = ("fp32", "bf16_mixed", "bf16")
BASE = {"lr": LR, "betas": BETAS, "eps": EPS, "block_parameters": ["w"], "weight_decay": 0.1}
LOW = BASE | {"rank": RANK, "update_proj_gap": GAP}


def gradients(shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """A drifting signal of known, well separated spectrum, so that bases are determined, plus noise."""
    random = torch.Generator().manual_seed(seed)
    m, n = shape
    k = min(shape)
    left = torch.linalg.qr(torch.randn(m, k, generator=random))[0]
    right = torch.linalg.qr(torch.randn(n, k, generator=random))[0]
    result = []
    for _ in range(STEPS):
        right = torch.linalg.qr(right + 0.02 * torch.randn(n, k, generator=random))[0]
        signs = torch.sign(torch.randn(k, generator=random))
        spectrum = 0.6 ** torch.arange(k) * signs
        result.append((left * spectrum) @ right.T + 0.003 * torch.randn(m, n, generator=random))
    return result


def start(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(99)) * 0.01


def build(
    parameter: nn.Parameter,
    config: OptimizerConfig,
    sampler: SamplerConfig,
    precision: Precision = Precision.fp32,
) -> CompositeOptimizer:
    return build_optimizer(
        [("w", parameter)], config, sampler, precision=precision, seed=0, total_steps=STEPS
    )


def run(optimizer: CompositeOptimizer, parameter: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for gradient in grads:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.data.double()


def error_of(
    config: OptimizerConfig,
    sampler: SamplerConfig,
    transcription: Transcription,
    shape: tuple[int, int],
    precision: str,
) -> float:
    """Largest difference of an entry after all steps, relative to the largest change of an entry."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    grads = [g.to(dtype) for g in gradients(shape)]
    parameter = nn.Parameter(start(shape).to(dtype))
    initial = parameter.data.double().clone()
    ours = run(build(parameter, config, sampler, Precision(precision)), parameter, grads)
    theirs = transcription(initial, grads)
    moved = (theirs - initial).abs().max()
    assert moved > LR  # the comparison is of something
    return float((ours - theirs).abs().max() / moved)
