"""Normal numbers that are a function of their place, as GPUs draw them."""

import math

import pytest
import torch

from rsotrain.config.samplers import HaarConfig
from rsotrain.subspace.bases import Bases
from rsotrain.subspace.random_bases import haar_sampler
from rsotrain.subspace.seeding import counted_normals, seed_of

CPU = torch.device("cpu")
SIZE, RANK = 24, 6


def test_numbers_are_normal_and_independent() -> None:
    """Moments and products of neighbours are within four standard errors of those of normal numbers."""
    x = counted_normals(1024, 2048, [seed_of(0, "a")], CPU)[0].double()
    y = counted_normals(1024, 2048, [seed_of(0, "b")], CPU)[0].double()
    root = math.sqrt(x.numel())
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) * root < 4 * math.sqrt(variance)
    flat = x.flatten()
    for lag in (1, 2, 3, 1024, 2048, flat.numel() // 2):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) * math.sqrt(flat.numel() - lag) < 4
    assert abs(float((x * y).mean())) * root < 4
    # Kolmogorov and Smirnov's distance, which exceeds 1.95/√n once in a thousand samples
    expected = torch.special.ndtr(flat.sort().values)
    found = (torch.arange(flat.numel()).double() + 0.5) / flat.numel()
    assert float((expected - found).abs().max()) * root < 1.95


def test_each_number_belongs_to_its_place() -> None:
    whole = counted_normals(7, 5, [3], CPU)[0]
    assert torch.equal(whole, counted_normals(7, 5, [3], CPU)[0])
    assert whole.unique().numel() == 35
    assert not torch.equal(whole, counted_normals(7, 5, [4], CPU)[0])


def test_many_numbers_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = counted_normals(9, 5, [3], CPU)[0]
    monkeypatch.setattr("rsotrain.subspace.seeding._PAIRS_AT_A_TIME", 4)
    assert torch.equal(counted_normals(9, 5, [3], CPU)[0], whole)


def bases() -> Bases:
    return Bases(
        {"w": (SIZE, RANK)}, haar_sampler(HaarConfig()), gap=4, staggered=False, seed=0, total_steps=100,
        dtype=torch.float32, devices={"w": CPU}, stored=False,
    )  # fmt: skip


def test_a_basis_of_the_other_kind_of_device_is_drawn_again_the_same() -> None:
    """The state says which numbers it has: those that were drawn on a GPU are drawn on a CPU, too."""
    here = bases()
    own = here["w"].clone()
    here.state["w"]["basis_seed"].fill_(~int(here.state["w"]["basis_seed"]))
    here.resume()
    of_gpu = here["w"].clone()
    assert not torch.equal(own, of_gpu)
    numbers = counted_normals(SIZE, RANK, [seed_of(here._seed_of("w", 0), 1)], CPU)[0]
    q, r = torch.linalg.qr(numbers)
    assert torch.equal(of_gpu, q * r.diagonal().sign())
    here.refresh("w", lambda: None, 5, 1.0)  # the next is this device's again
    assert int(here.state["w"]["basis_seed"]) >= 0
