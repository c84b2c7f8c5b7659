"""Samplers by norms: coordinates, cosines; and the scale that makes a mixture unbiased."""

import pytest
import torch
from helpers.runs import compose
from torch import Tensor

from rsotrain.config.identity import identity
from rsotrain.config.samplers import MixtureConfig
from rsotrain.optim.build import build_sampler
from rsotrain.subspace.bases import Bases, BasisChange
from rsotrain.subspace.gram import DenseGram, GradientGram
from rsotrain.subspace.numbered import cosine_basis
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator
from rsotrain.subspace.spectral import dct, mixture_scales, row_norm

SIZE, RANK = 24, 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def request_of(gradient: Tensor, index: int = 0, rank: int = RANK) -> SampleRequest:
    return SampleRequest(
        gradient.shape[1], rank, GradientGram(gradient), generator(0, "t", index), torch.device("cpu")
    )


@pytest.mark.parametrize("size", [1, 2, 24, 61])
def test_the_cosine_transform_is_orthonormal(size: int) -> None:
    basis = cosine_basis(size, torch.device("cpu"))
    assert torch.allclose(basis.T @ basis, torch.eye(size), atol=1e-6)


def test_dct_finds_the_waves_that_a_gradient_is_made_of() -> None:
    waves = cosine_basis(SIZE, torch.device("cpu"))[:, [0, 3, 4, 11, 19, 23]]
    gradient = noise(40, RANK) @ waves.T + 0.01 * noise(40, SIZE, seed=1)
    assert torch.allclose(dct(request_of(gradient)), waves, atol=1e-6)


def test_row_norm_draws_coordinates_in_proportion_to_their_norms() -> None:
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    gradient = torch.nn.functional.normalize(noise(40, 5), dim=0) * norms
    counts = sum(row_norm(request_of(gradient, index, rank=1), 1.0).flatten() for index in range(2000))
    assert isinstance(counts, Tensor)
    # 2000 draws scatter by 1.1 % of them at most
    assert torch.allclose(counts / 2000, norms / norms.sum(), atol=0.05)
    squares = sum(row_norm(request_of(gradient, index, rank=1), 2.0).flatten() for index in range(2000))
    assert isinstance(squares, Tensor)
    assert torch.allclose(squares / 2000, norms**2 / (norms**2).sum(), atol=0.05)


def test_row_norm_at_the_rank_of_all_is_all() -> None:
    assert torch.equal(row_norm(request_of(noise(40, SIZE), rank=SIZE), 1.0), torch.eye(SIZE))


def bases(unbiased: bool, fraction: float = 0.5) -> Bases:
    sampler = build_sampler(MixtureConfig("mixture", principal_fraction=fraction, unbiased=unbiased))
    assert sampler is not None
    return Bases(
        {"w": (SIZE, RANK)}, sampler, gap=1, staggered=False, seed=0, total_steps=10**6,
        dtype=torch.float32, devices={"w": torch.device("cpu")}, scaled=True,
    )  # fmt: skip


def products(unbiased: bool, fraction: float) -> Tensor:
    """The mean of PPᵀ over many refreshes with one gradient."""
    drawn = bases(unbiased, fraction)
    gram = DenseGram((noise(SIZE, SIZE) @ torch.diag(0.7 ** torch.arange(SIZE)) @ noise(SIZE, SIZE).T).cov())
    total = torch.zeros(SIZE, SIZE)
    for step in range(1, 2001):
        drawn.refresh("w", lambda: gram, step, 1.0)
        total += drawn["w"] @ drawn["w"].T
    return total / 2000


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.0, 0.34, 0.5, 0.84])
def test_an_unbiased_mixture_has_the_identity_for_its_mean(fraction: float) -> None:
    # one direction drawn of 19 counts 19 times where it falls: entries scatter by 19/√2000 · 0.05
    assert float((products(True, fraction) - torch.eye(SIZE)).abs().max()) < 0.25
    if fraction > 0:
        assert float((products(False, fraction) - torch.eye(SIZE)).abs().max()) > 0.5


def test_the_norm_of_a_projected_gradient_is_that_of_the_gradient_in_the_mean() -> None:
    """What RSO logs: ‖dW P‖² with P of an unbiased mixture, without further weights."""
    gradient = noise(10, SIZE, seed=5)
    mean = products(True, 0.5)
    assert float((gradient @ mean * gradient).sum()) == pytest.approx(
        float(gradient.square().sum()), rel=0.03
    )


def test_the_scales_are_those_of_prac() -> None:
    assert mixture_scales(24, 6, 0.5).tolist() == pytest.approx([1, 1, 1, 7**0.5, 7**0.5, 7**0.5])
    assert mixture_scales(24, 6, 1.0).tolist() == [1] * 6


def test_moments_are_carried_over_between_columns_of_several_norms() -> None:
    """A P_old becomes A P_new where A lies in both subspaces, whatever the norms of the columns."""
    common = torch.linalg.qr(noise(SIZE, RANK))[0]
    turned = common @ torch.linalg.qr(noise(RANK, RANK, seed=1))[0]
    scales = mixture_scales(SIZE, RANK, 0.5)
    old, new = common * scales, turned * scales.flip(0)
    change = BasisChange(old, new, scales)
    inside = noise(10, RANK, seed=2) @ common.T
    assert torch.allclose(inside @ old @ change.transition.T, inside @ new, rtol=1e-4, atol=1e-5)
    assert float(change.overlap(orthonormal=True)) == pytest.approx(1.0, rel=1e-5)


def test_a_run_that_knew_no_unbiased_mixture_goes_on_as_it_was() -> None:
    biased = compose(["optimizer=rso", "sampler=mixture", "sampler.unbiased=false"])
    assert "unbiased" not in str(identity(biased))
    assert "unbiased" in str(identity(compose(["optimizer=rso", "sampler=mixture"])))
