"""Every sampler, and gradients of all kinds for them."""

import torch
from helpers.methods import SAMPLERS, sampler_config
from torch import Tensor

from rsotrain.config.samplers import OnlinePCAConfig, PCASolver, SvdConfig, SvdSolver
from rsotrain.optim.build import build_sampler
from rsotrain.subspace.samplers import Sampler

ROWS, SIZE, RANK = 40, 24, 6


def spectrum(values: Tensor, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with these singular values, rows × len(values)."""
    random = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=random, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=random, dtype=torch.float64))[0]
    return ((left * values.double()) @ right.T).to(dtype)


def built_samplers() -> dict[str, Sampler]:
    """Every sampler of conf/sampler, and the forms that their settings give them."""
    configs = [sampler_config(name) for name in SAMPLERS]
    configs += [
        SvdConfig(name="full_svd", solver=SvdSolver.full),
        OnlinePCAConfig(name="online_pca-orthonormal", lr=0.05, solver=PCASolver.sgd, orthonormalize=True),
    ]
    built = {config.name: sampler for config in configs if (sampler := build_sampler(config)) is not None}
    on_gpu = {f"{name}-on_gpu": s.on_gpu for name, s in built.items() if s.on_gpu is not None}
    return built | on_gpu


BUILT = built_samplers()
ORTHONORMAL = {name: sampler.sample for name, sampler in BUILT.items() if sampler.orthonormal}
GRADIENTS = {
    "ordinary": spectrum(0.9 ** torch.arange(SIZE)),
    "square": spectrum(0.9 ** torch.arange(SIZE), rows=SIZE),
    "zero": torch.zeros(ROWS, SIZE),
    "rank 2": spectrum((torch.arange(SIZE) < 2).float()),
    "rank 0.5 of the basis": spectrum((torch.arange(SIZE) < RANK // 2).float()),
    "ill-conditioned": spectrum(10.0 ** -torch.arange(SIZE)),
    "flat": spectrum(torch.ones(SIZE)),
    "huge": spectrum(0.9 ** torch.arange(SIZE)) * 1e36,
    "tiny": spectrum(0.9 ** torch.arange(SIZE)) * 1e-36,
    "subnormal": torch.full((ROWS, SIZE), 1e-42),
    "one entry": torch.zeros(ROWS, SIZE).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)),
    "bfloat16": spectrum(0.9 ** torch.arange(SIZE)).bfloat16(),
}
