"""GaLore against its authors' package."""

import pytest
import torch
from helpers.other_packages import package_without_init
from helpers.uncorrected_eps import UncorrectedEps
from torch import nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import GaLoreConfig
from rsotrain.optim.base import Settings, StateKeeper
from rsotrain.optim.subspace_optimizer import Subspace
from rsotrain.subspace.samplers import Sampler
from rsotrain.subspace.spectral import full_svd


@pytest.fixture
def galore_adamw(monkeypatch: pytest.MonkeyPatch) -> type[torch.optim.Optimizer]:
    """Their AdamW alone: their package's own import wants bitsandbytes for the 8-bit one."""
    package_without_init("galore_torch", monkeypatch)
    pytest.importorskip("transformers")
    return pytest.importorskip("galore_torch.adamw").AdamW


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12)])
def test_thirty_steps_with_two_refreshes(
    galore_adamw: type[torch.optim.Optimizer], shape: tuple[int, int]
) -> None:
    steps, gap, rank, lr, scale = 30, 10, 4, 0.01, 0.25
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [theirs], "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
    # Their weight decay comes after the update and at the unscaled rate; ours is before it: leave it out.
    expected = galore_adamw([group], lr=lr, eps=1e-6, no_deprecation_warning=True)  # type: ignore[call-arg]
    sampler = Sampler("svd", full_svd, informed=True)
    group = UncorrectedEps(
        "galore",
        {"w": ours},
        lr * scale,
        Settings(StateKeeper(torch.float32, 0), (0.9, 0.999), 1e-6),
        GaLoreConfig(name="galore"),
        Subspace(sampler, rank, gap, OnRefresh.keep),
    )
    for step in range(1, steps + 1):
        gradient = torch.randn(shape, generator=random)
        ours.grad, theirs.grad = gradient, gradient.clone()
        group.update(step, 1.0)
        expected.step()
    moved = (theirs.data - start).norm()
    assert float(moved) > 0.05
    assert float((ours.data - theirs.data).norm() / moved) < 1e-4
