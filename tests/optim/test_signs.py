"""Methods that take the signs of a residual: which entries have one, in float32 and in bfloat16."""

import pytest
import torch
from helpers.runs import PRECISIONS
from torch import Tensor, nn

from rsotrain.config.methods import FrugalConfig, GaLoreConfig
from rsotrain.config.samplers import CoordinateConfig, SamplerConfig, SvdConfig
from rsotrain.config.schema import Precision
from rsotrain.optim.build import build_optimizer
from rsotrain.subspace.seeding import generator

RANK = 16
SHAPES = [(96, 64), (64, 96), (64, 64)]
SVD = SvdConfig(name="svd")
AXES = CoordinateConfig(name="coordinate")


def step(
    kind: type[GaLoreConfig],
    sampler: SamplerConfig,
    gradient: Tensor,
    precision: Precision,
    scale: float = 1.0,
) -> Tensor:
    """What one step with a rate of 1 adds to a weight of zeros."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=dtype))
    config = kind(name="x", lr=1.0, rank=RANK, update_proj_gap=9, block_parameters=["w"])
    optimizer = build_optimizer(
        [("w", parameter)], config, sampler, precision=precision, seed=1, total_steps=2
    )
    parameter.grad = (gradient * scale).to(dtype)
    optimizer.step()
    return parameter.data.float()


def signs(sampler: SamplerConfig, gradient: Tensor, precision: Precision, scale: float = 1.0) -> Tensor:
    """Those FRUGAL takes: what it subtracts beside GaLore's step."""
    galore = step(GaLoreConfig, sampler, gradient, precision, scale)
    difference = galore - step(FrugalConfig, sampler, gradient, precision, scale)
    # updates are of size 2 or so: rounded to 8 bits, once for each method
    assert float((difference - difference.round()).abs().max()) < 0.05
    return difference.round()


def decaying(shape: tuple[int, int]) -> Tensor:
    """Exact in bfloat16, of a spectrum whose dominant 16 directions have nine tenths of the energy."""
    random = torch.Generator().manual_seed(0)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=random))[0] for n in shape)
    return ((left * 0.93 ** torch.arange(k)) @ right.T).bfloat16().float()


def rows_first(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_the_residuals_wherever_it_is_more_than_rounding(
    shape: tuple[int, int], precision: Precision
) -> None:
    gradient = decaying(shape)
    found = rows_first(signs(SVD, gradient, precision))
    a = rows_first(gradient).double()
    basis = torch.linalg.svd(a, full_matrices=False)[2][:RANK].T
    residual = a - a @ basis @ basis.T
    assert float(residual.norm() / a.norm()) == pytest.approx(0.31, abs=0.05)
    right = found == residual.sign()
    assert bool((right | (found == 0)).all())  # none is turned
    # twice the bound of what counts: once for it, once for the rounding that may take an entry below it
    k = a.shape[1]
    bound = 8 * k**0.5 * torch.finfo(torch.float32).eps
    if precision is not Precision.fp32:
        bound += 4 * torch.finfo(torch.bfloat16).eps / k**0.5
    assert bool(right[residual.abs() > bound * a.norm(dim=1, keepdim=True)].all())
    assert float(right.double().mean()) > 0.9


# With large columns and in float32 it is the basis that is not exact: its Gram matrix squares the condition.
@pytest.mark.parametrize(
    ("precision", "large"),
    [*((precision, 0) for precision in PRECISIONS), (Precision.bf16_mixed, 4), (Precision.bf16, 4)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_errors_have_no_sign(shape: tuple[int, int], precision: Precision, large: int) -> None:
    random = torch.Generator().manual_seed(0)
    rows, columns = shape
    right = torch.randn(RANK, columns, generator=random)
    right[:, :large] *= 30.0  # what a dominant subspace captures is often in few columns
    gradient = torch.randn(rows, RANK, generator=random) @ right
    # the last rows and columns are zero: nothing to divide by, and still no sign
    gradient[-1], gradient[:, -1] = 0.0, 0.0
    found = signs(SVD, gradient, precision)
    # the bound is five times the size of bfloat16's errors; among thousands of entries a few exceed it
    assert float((found != 0).double().mean()) <= (0.0 if precision is Precision.fp32 else 1e-3)
    assert bool((found[-1] == 0).all() and (found[:, -1] == 0).all())


@pytest.mark.parametrize("scale", [1.0, 1e-20])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outside_axes_every_entry_has_its_own_sign(
    shape: tuple[int, int], precision: Precision, scale: float
) -> None:
    gradient = decaying(shape)
    found = rows_first(signs(AXES, gradient, precision, scale))
    picked = torch.randperm(found.shape[1], generator=generator(1, "basis", "w", 0))[:RANK]
    outside = torch.ones(found.shape[1], dtype=torch.bool)
    outside[picked] = False
    assert torch.equal(found[:, outside], rows_first(gradient).sign()[:, outside])
    assert bool((found[:, picked] == 0).all())
