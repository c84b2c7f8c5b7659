"""Our methods against other packaged implementations, each skipped where its package is not installed.

Compared with apollo-torch 1.0.3, pytorch-optimizer 4.1.0, torch-optimi 0.3.3 and emerging-optimizers 0.3.0
(which wants Python 3.12); for galore-torch see ``test_optim_galore_torch.py``. Not compared, because they
are other methods than the papers': pytorch-optimizer's APOLLO (it scales P·R, not the gradient) and its SaRA
(not the SARA that I3S became).
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.other_packages import package_without_init
from helpers.uncorrected_eps import UncorrectedEps
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import (
    AdamConfig,
    ApolloConfig,
    FiraConfig,
    MuonConfig,
    OptimizerConfig,
    SNConfig,
)
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.optim.base import ParamGroupOptimizer, Settings, StateKeeper
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.residuals import Apollo, Fira
from rsotrain.optim.subspace_optimizer import Subspace
from rsotrain.subspace.samplers import Columns, Sampler, SampleRequest
from rsotrain.subspace.spectral import full_svd

STEPS, GAP, RANK, LR = 30, 10, 4, 0.01  # refreshes at steps 1, 11 and 21
BETAS = (0.9, 0.999)
SHAPES = [(24, 10), (10, 24), (12, 12)]
# ε inside or outside the bias correction: no difference where it is this small
NO_EPS = 1e-30
UNLIMITED = 1e9  # a growth of the update's norm that never happens

Class = Callable[..., torch.optim.Optimizer]
Hook = Callable[[int], None]


def start(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def noise(shape: tuple[int, int], step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def nothing(step: int) -> None:
    pass


def distance(
    ours: nn.Parameter,
    group: ParamGroupOptimizer,
    theirs: nn.Parameter,
    expected: torch.optim.Optimizer,
    *,
    gradient: Callable[[tuple[int, int], int], Tensor] = noise,
    before: Hook = nothing,
    after: Hook = nothing,
) -> float:
    """‖W − W'‖/‖W' − W₀‖ after 30 steps; theirs goes first. ``before`` and ``after`` each step of theirs.

    1e-4 is the bar: 30 steps of float32 rounding (6e-8), enlarged where Adam divides by a small entry; found
    are 1e-5 and less. Where ``theirs`` has the shape of Wᵀ, it gets Gᵀ.
    """
    shape = (ours.shape[0], ours.shape[1])
    turned = theirs.shape != ours.shape
    initial = theirs.data.clone()
    for step in range(1, STEPS + 1):
        ours.grad = gradient(shape, step)
        theirs.grad = (ours.grad.T if turned else ours.grad).clone(memory_format=torch.contiguous_format)
        before(step)
        expected.step()
        after(step)
        group.update(step, 1.0)
    moved = (theirs.data - initial).norm()
    assert float(moved) > 0.05  # the comparison is of something
    result = theirs.data.T if turned else theirs.data
    return float((ours.data - result).norm() / moved)


def settings(eps: float, weight_decay: float = 0.0) -> Settings:
    return Settings(StateKeeper(torch.float32, 0), BETAS, eps, weight_decay)


def subspace(sampler: Sampler, rank: int = RANK) -> Subspace:
    return Subspace(sampler, rank, GAP, OnRefresh.keep, total_steps=STEPS)


SVD = Sampler("svd", full_svd, informed=True)


def basis_of(expected: torch.optim.Optimizer, theirs: nn.Parameter) -> Sampler:
    """The basis that their projector, which has been computed already, projects with; taken as it is."""

    def sample(request: SampleRequest) -> Tensor:
        matrix: Tensor = expected.state[theirs]["projector"].ortho_matrix
        return (matrix if matrix.shape[0] == request.size else matrix.T).clone()

    return Sampler("theirs", sample, Columns.unit)


def corrected_limiter(expected: torch.optim.Optimizer, theirs: nn.Parameter, key: str) -> Hook:
    """Their norm-growth limiters compare updates without Adam's bias correction, ours with it.

    Theirs is √(1−β₂ᵗ)/(1−β₁ᵗ), applied with the learning rate. Its change from a step to the next is put
    into the norm that they keep, ``key``; the papers do not say which norm it is.
    """

    def correction(step: int) -> float:
        return math.sqrt(1.0 - BETAS[1] ** step) / (1.0 - BETAS[0] ** step)

    def after(step: int) -> None:
        state = expected.state[theirs]
        state[key] = state[key] * (correction(step) / correction(step + 1))

    return after


# --- apollo-torch ------------------------------------------------------------------------------


@pytest.fixture
def apollo_adamw(monkeypatch: pytest.MonkeyPatch) -> Class:
    """Their AdamW alone: their package's own import wants bitsandbytes for the 8-bit one."""
    package_without_init("apollo_torch", monkeypatch)
    pytest.importorskip("transformers")
    result: Class = pytest.importorskip("apollo_torch.apollo").AdamW
    return result


def apollos(
    adamw: Class, shape: tuple[int, int], *, per_tensor: bool, proj: str, limited: bool
) -> tuple[nn.Parameter, Apollo, nn.Parameter, torch.optim.Optimizer]:
    ours, theirs = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    rank, scale = (1, 128.0) if per_tensor else (RANK, 0.25)
    group = {
        "params": [theirs], "rank": rank, "update_proj_gap": GAP, "scale": scale, "proj": proj,
        "proj_type": "std", "scale_type": "tensor" if per_tensor else "channel",
    }  # fmt: skip
    # Their weight decay comes after the update and at the unscaled rate; ours is before it: left out.
    expected = adamw([group], lr=LR, betas=BETAS, eps=NO_EPS, disable_nl=not limited)
    lr = LR * scale**0.5
    sampler = basis_of(expected, theirs)
    if proj == "svd":
        # They scale random bases to E[PPᵀ] = I and leave singular vectors as they are; ours scales both.
        # Adam is blind to a factor of R, s_j = ‖N_j‖/‖R_j‖ is its inverse: the rate takes it.
        sampler, lr = SVD, lr * (min(shape) / rank) ** 0.5
    growth = 1.01 if limited else UNLIMITED
    group = Apollo(
        "apollo",
        {"w": ours},
        lr,
        settings(NO_EPS),
        ApolloConfig(name="apollo", per_tensor=per_tensor, max_growth=growth),
        subspace(sampler, rank),
    )
    return ours, group, theirs, expected


@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_is_apollo_torch(
    apollo_adamw: Class, shape: tuple[int, int], per_tensor: bool, proj: str
) -> None:
    weights = []
    for limited in (False, True):
        case = apollos(apollo_adamw, shape, per_tensor=per_tensor, proj=proj, limited=limited)
        ours, _, theirs, expected = case
        after = corrected_limiter(expected, theirs, "scaled_grad") if limited else nothing
        assert distance(*case, after=after) < 1e-4
        weights.append(ours.data)
    assert float((weights[0] - weights[1]).norm() / (weights[0] - start(shape)).norm()) > 0.05


# --- pytorch-optimizer -------------------------------------------------------------------------


@pytest.fixture
def pytorch_optimizer() -> Any:
    return pytest.importorskip("pytorch_optimizer")


def refresh_at_one(expected: torch.optim.Optimizer, theirs: nn.Parameter) -> Hook:
    """Theirs are at steps 1, T, 2T; this makes them 1, 1 + T, 1 + 2T as in GaLore's paper and code."""

    def before(step: int) -> None:
        if step > 1:
            projector = expected.state[theirs]["projector"]
            projector.update_proj_gap = STEPS + 1
            if step % GAP == 1:
                projector.ortho_matrix = None

    return before


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_is_pytorch_optimizers(pytorch_optimizer: Any, shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    scale, eps = 0.25, 1e-6
    group = {
        "params": [theirs],
        "rank": RANK,
        "update_proj_gap": GAP,
        "scale": scale,
        "projection_type": "std",
    }
    # Their weight decay comes after the update and at the unscaled rate; ours is before it: left out.
    expected = pytorch_optimizer.GaLore([group], lr=LR, betas=BETAS, eps=eps)
    group = UncorrectedEps("galore", {"w": ours}, LR * scale, settings(eps), subspace(SVD))
    assert distance(ours, group, theirs, expected, before=refresh_at_one(expected, theirs)) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_is_pytorch_optimizers(pytorch_optimizer: Any, shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    # scale = 1: any other leaks into their residual, G − scale·PPᵀG, and leaves its part of the update as is
    group = {"params": [theirs], "rank": RANK, "update_proj_gap": GAP, "scale": 1.0, "projection_type": "std"}
    expected = pytorch_optimizer.Fira([group], lr=LR, betas=BETAS, eps=NO_EPS)
    group = Fira(
        "fira", {"w": ours}, LR, settings(NO_EPS), FiraConfig(name="fira", max_growth=1.01), subspace(SVD)
    )
    found = distance(
        ours, group, theirs, expected,
        before=refresh_at_one(expected, theirs),
        after=corrected_limiter(expected, theirs, "scaling_grad"),
    )  # fmt: skip
    assert found < 1e-4


@pytest.mark.parametrize("subsets_in_a_row", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_subset_norm_is_pytorch_optimizers(
    pytorch_optimizer: Any, shape: tuple[int, int], subsets_in_a_row: int
) -> None:
    ours = nn.Parameter(start(shape))
    # Their subsets are runs of memory, so rows; the paper's are columns if there are fewer rows than columns.
    turned = shape[0] < shape[1]
    theirs = nn.Parameter((ours.data.T if turned else ours.data).clone(memory_format=torch.contiguous_format))
    size, eps = min(shape) // subsets_in_a_row, 1e-3  # of V's size: where it stands shows
    # Their weight decay comes after the update, ours before it: left out.
    expected = pytorch_optimizer.AdamWSN(
        [{"params": [theirs], "sn": True}], lr=LR, betas=BETAS, eps=eps, subset_size=size
    )
    config = SNConfig(name="sn", lr=LR, betas=BETAS, eps=eps, subset_size=size, block_parameters=["w"])
    assert distance(ours, built(ours, config), theirs, expected) < 1e-4


# --- AdamW and Muon ------------------------------------------------------------------------------


def built(parameter: nn.Parameter, config: OptimizerConfig) -> ParamGroupOptimizer:
    sampler = NoSamplerConfig(name="none")
    (group,) = build_optimizer([("w", parameter)], config, sampler, seed=0, total_steps=STEPS).groups
    return group


def test_adamw_is_optimis() -> None:
    optimi = pytest.importorskip("optimi")
    shape = SHAPES[0]
    ours, theirs = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    own = {"lr": LR, "betas": BETAS, "eps": 1e-3, "weight_decay": 0.1}
    expected = optimi.AdamW([theirs], triton=False, **own)
    config = AdamConfig(name="adam", block_parameters=["w"], **own)
    assert distance(ours, built(ours, config), theirs, expected) < 1e-4


MUON = {"lr": 0.02, "weight_decay": 0.1}


def _pytorch_optimizers_muon(parameter: nn.Parameter, own: dict[str, Any]) -> torch.optim.Optimizer:
    package = pytest.importorskip("pytorch_optimizer")
    result: torch.optim.Optimizer = package.Muon(
        [{"params": [parameter], "use_muon": True}], use_adjusted_lr=True, **own
    )
    return result


def _emerging_optimizers_muon(parameter: nn.Parameter, own: dict[str, Any]) -> torch.optim.Optimizer:
    # an ImportError other than "not found": below Python 3.12, or without triton
    package = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers", exc_type=ImportError)
    result: torch.optim.Optimizer = package.Muon(
        [parameter], coefficient_type="simple", scale_mode="spectral", extra_scale_factor=0.2, **own
    )
    return result


Build = Callable[[nn.Parameter, dict[str, Any]], torch.optim.Optimizer]
MUONS = [_pytorch_optimizers_muon, _emerging_optimizers_muon]


def signs(shape: tuple[int, int], step: int) -> Tensor:
    return torch.sign(noise(shape, step))


@pytest.mark.parametrize("muon", MUONS)
@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (16, 16)])
def test_orthogonalization_is_theirs(muon: Build, shape: tuple[int, int]) -> None:
    """Newton-Schulz runs in bfloat16, here from an exact start: signs, whose norm is 16 in these shapes."""
    ours, theirs = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    own = MUON | {"momentum": 0.0, "nesterov": False}
    config = MuonConfig(name="muon", block_parameters=["w"], **own)
    assert distance(ours, built(ours, config), theirs, muon(theirs, own), gradient=signs) < 1e-4


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("muon", "tolerance"),
    # emerging-optimizers normalises before it rounds to bfloat16, torch after: each entry that Newton-Schulz
    # starts from differs by up to 4e-3, at random, and it enlarges what is small
    [(_pytorch_optimizers_muon, 1e-4), (_emerging_optimizers_muon, 0.015)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_theirs(muon: Build, tolerance: float, shape: tuple[int, int], nesterov: bool) -> None:
    ours, theirs = nn.Parameter(start(shape)), nn.Parameter(start(shape))
    own = MUON | {"momentum": 0.9, "nesterov": nesterov}
    config = MuonConfig(name="muon", block_parameters=["w"], **own)
    assert distance(ours, built(ours, config), theirs, muon(theirs, own)) < tolerance
