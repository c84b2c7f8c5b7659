"""Alice's subspaces: leading directions of what is remembered and seen, random ones outside the rest."""

from functools import partial

import torch
from torch import Tensor

from rsotrain.subspace.gram import GradientGram, TrackedGram
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator
from rsotrain.subspace.spectral import svd, switching

ROWS, SIZE, RANK = 40, 24, 6


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def request_of(gram: GradientGram, previous: Tensor | None, index: int = 0) -> SampleRequest:
    random = generator(0, "test", index)
    return SampleRequest(SIZE, RANK, gram, random, torch.device("cpu"), previous=previous)


def gradient_of(decay: float = 0.8) -> Tensor:
    u, _, vh = torch.linalg.svd(noise(ROWS, SIZE), full_matrices=False)
    return (u * decay ** torch.arange(SIZE)) @ vh


def test_the_first_subspace_is_the_dominant_one() -> None:
    request = request_of(GradientGram(gradient_of()), None)
    assert torch.equal(switching(request, leading=2), svd(request))


def test_leading_directions_stay_and_the_others_come_from_outside() -> None:
    gram = GradientGram(gradient_of())
    dominant = svd(request_of(gram, None))
    drawn = [switching(request_of(gram, dominant, index), leading=2) for index in (1, 2)]
    for basis in drawn:
        # a power iteration from the dominant subspace gives it again
        cosines = (basis[:, :2] * dominant[:, :2]).sum(0)
        assert torch.allclose(cosines, torch.ones(2), atol=1e-5)
        assert float((dominant.T @ basis[:, 2:]).abs().max()) < 1e-5
    assert not torch.allclose(drawn[0][:, 2:], drawn[1][:, 2:], atol=0.1)


def test_no_more_is_drawn_than_there_is_outside() -> None:
    gram = GradientGram(gradient_of())
    random = generator(0, "test", 1)
    rank = SIZE - 2
    dominant = svd(SampleRequest(SIZE, rank, gram, random, torch.device("cpu")))
    request = SampleRequest(SIZE, rank, gram, random, torch.device("cpu"), previous=dominant)
    basis = switching(request, leading=1)
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
    overlap = (dominant.T @ basis).square().sum()
    assert abs(float(overlap) - (rank - 2)) < 1e-3  # both directions outside have come in


def test_one_power_iteration_turns_towards_the_gradient() -> None:
    gram = GradientGram(gradient_of(0.5))
    basis = torch.linalg.qr(noise(SIZE, RANK))[0]
    sample = partial(switching, leading=RANK)
    captured = []
    for index in range(3):
        captured.append(float((gradient_of(0.5) @ basis).norm()))
        basis = sample(request_of(gram, basis, index))
    assert captured == sorted(captured)
    assert captured[-1] > 0.999 * float(gradient_of(0.5).norm())


def test_the_tracked_gram_matrix_is_that_of_its_factor() -> None:
    gradient, root = noise(ROWS, SIZE) * 1e-3, noise(RANK, RANK, seed=1) * 1e-3
    basis = torch.linalg.qr(noise(SIZE, RANK, seed=2))[0]
    tracked, weight = root @ root.T, 3.0
    inner = GradientGram(gradient)
    gram = TrackedGram(inner, inner.largest, basis, tracked, weight)
    expected = gradient.T @ gradient + weight * basis @ tracked @ basis.T
    expected = (expected / inner.largest**2).double()
    block = noise(SIZE, 3, seed=3)
    factor = gram.factor()
    assert factor is not None
    for found, wanted in (
        (gram.matrix(torch.float64), expected),
        (gram.matrix(torch.float32).double(), expected),
        (gram.matmul(block).double(), expected @ block.double()),
        (gram.diagonal().double(), expected.diagonal()),
        (gram.energy().double(), expected.trace()),
        (factor.T @ factor, expected),
    ):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
