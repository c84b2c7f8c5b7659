"""A small model with linears that share an input, and one that is not projected, for the tests of RSO."""

import torch
from helpers.methods import SAMPLERS as CONF_SAMPLERS
from helpers.methods import sampler_config
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import OptimizerConfig, RSOConfig
from rsotrain.config.samplers import HaarConfig, OnlinePCAConfig, SamplerConfig, SvdConfig
from rsotrain.models.layers import Linear, apply_shared
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer

IN, OUT, MIDDLE, TOKENS = 12, 16, 10, 40
RANK, GAP, STEPS, LR = 4, 7, 30, 0.01
BETAS, EPS = (0.9, 0.99), 1e-8
SCALE = (IN / RANK) ** 0.5
HAAR, SVD = HaarConfig(name="haar"), SvdConfig(name="svd")


class Toy(nn.Module):
    """Two linears that read the input, one that reads the sum of what they give, and a plain one."""

    shared_inputs = (("first", "second"), ("third",))

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.second = Linear(IN, MIDDLE), Linear(IN, MIDDLE)
        self.third, self.head = Linear(MIDDLE, OUT), Linear(OUT, 3)
        random = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=random, dtype=torch.float64) * 0.3).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        first, second = apply_shared(x, self.first, self.second)
        return self.head(torch.tanh(self.third(first * torch.tanh(second))))


BLOCKS = ["^(first|second|third)"]


def config(**own: object) -> RSOConfig:
    settings = {
        "name": "rso", "lr": LR, "betas": BETAS, "eps": EPS, "block_parameters": BLOCKS, "rank": RANK,
        "update_proj_gap": GAP, "on_refresh": OnRefresh.reset,
    }  # fmt: skip
    return RSOConfig(**(settings | own))  # type: ignore[arg-type]


def build(
    model: nn.Module, settings: OptimizerConfig, sampler: SamplerConfig = HAAR, **own: object
) -> CompositeOptimizer:
    arguments = {"seed": 0, "total_steps": STEPS} | own
    return build_optimizer(model, settings, sampler, **arguments)  # type: ignore[arg-type]


def batch(t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated inputs with a spectrum, so that informed bases are determined."""
    random = torch.Generator().manual_seed(100 + t)
    mix = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)).double())[0]
    x = torch.randn(TOKENS, IN, generator=random).double()
    return ((x * 0.7 ** torch.arange(IN)) @ mix.T).to(dtype)


def train(
    model: nn.Module, optimizer: CompositeOptimizer, steps: range, micro_batches: int = 1
) -> list[float]:
    losses = []
    for t in steps:
        total = 0.0
        for x in batch(t, next(model.parameters()).dtype).chunk(micro_batches):
            with optimizer.observing():
                loss = (model(x).float() - 1.0).square().sum() / TOKENS
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# every sampler of conf/sampler that RSO takes
SAMPLERS: dict[str, SamplerConfig] = {name: sampler_config(name) for name in CONF_SAMPLERS if name != "none"}
SAMPLERS["online_pca"] = OnlinePCAConfig(name="online_pca", orthonormalize=True)
