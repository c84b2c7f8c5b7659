"""Single samplers and methods: APOLLO's scaling, GoLore's switch, the law of importance sampling."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor, nn

from rsotrain.config.methods import ApolloConfig, GaLoreConfig
from rsotrain.config.samplers import (
    CoordinateConfig,
    GoLoreConfig,
    HaarConfig,
    SamplerConfig,
    SRHTConfig,
    SvdConfig,
)
from rsotrain.optim import reference
from rsotrain.optim.build import build_optimizer
from rsotrain.subspace import random_bases
from rsotrain.subspace.gram import GradientGram
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator
from rsotrain.subspace.spectral import importance

STEPS, GAP, RANK, LR = 20, 5, 3, 0.01
BETAS, EPS = (0.9, 0.99), 1e-8
SHAPES = {"right": (24, 10), "left": (10, 24), "square": (12, 12)}
BASE = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
LOW = {"rank": RANK, "update_proj_gap": GAP}
SVD, HAAR = SvdConfig(name="svd"), HaarConfig(name="haar")


def noise(shape: tuple[int, int], *labels: str | int) -> Tensor:
    return torch.randn(shape, generator=generator(1, *labels))


def spectral(shape: tuple[int, int], step: int) -> Tensor:
    """Singular values 1, 0.7, 0.49, …, so that the dominant ones are determined."""
    u, _, vh = torch.linalg.svd(noise(shape, "gradient", step), full_matrices=False)
    return (u * 0.7 ** torch.arange(min(shape))) @ vh


def random_request(size: int, rank: int, index: int) -> SampleRequest:
    """What a sampler gets for the refresh of this index, for the matrix "w" of a run of seed 0."""
    return SampleRequest(size, rank, None, generator(0, "basis", "w", index), torch.device("cpu"))


def difference(ours: Tensor, theirs: Tensor, initial: Tensor) -> float:
    """Largest difference of an entry, relative to the largest change of an entry."""
    moved = (theirs - initial.double()).abs().max()
    assert moved > LR  # the comparison is of something
    return float((ours.double() - theirs).abs().max() / moved)


# --- APOLLO's √(k/r) -----------------------------------------------------------------------------


def scaled(
    sampler: Callable[[SampleRequest], Tensor] | None,
) -> Callable[[int, Tensor, int, Tensor | None], Tensor]:
    """The reference's ``sample``: orthonormal (None: the singular vectors) times √(k/r), for E[PPᵀ] = I."""

    def sample(t: int, gradient: Tensor, rank: int, old: Tensor | None) -> Tensor:
        size = gradient.shape[1]
        if sampler is None:
            basis = reference.dominant(t, gradient, rank, old)
        else:
            basis = sampler(random_request(size, rank, (t - 1) // GAP)).double()
        return basis * (size / rank) ** 0.5

    return sample


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(
    ("sampler", "function"),
    [
        (HAAR, random_bases.haar),
        (CoordinateConfig(name="coordinate"), random_bases.coordinate),
        (SRHTConfig(name="srht"), random_bases.srht),
        (SVD, None),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
@pytest.mark.parametrize("side", SHAPES)
def test_apollo_scales_orthonormal_bases_as_gaussian_ones(
    side: str, sampler: SamplerConfig, function: Callable[[SampleRequest], Tensor] | None, per_tensor: bool
) -> None:
    initial = noise(SHAPES[side], "start") * 0.01
    gradients = [spectral(SHAPES[side], step) for step in range(1, STEPS + 1)]
    parameter = nn.Parameter(initial.clone())
    config = ApolloConfig(name="apollo", per_tensor=per_tensor, block_parameters=["w"], **BASE, **LOW)
    optimizer = build_optimizer([("w", parameter)], config, sampler, seed=0, total_steps=STEPS)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    own = BASE | {"rank": RANK, "gap": GAP, "per_tensor": per_tensor}
    expected = reference.apollo(initial, gradients, sample=scaled(function), **own)
    # as in test_optim_reference: float32 rounding, enlarged where Adam divides by small projected entries
    assert difference(parameter.data, expected, initial) < 1e-4


# --- GoLore through a run ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("random_fraction", "switch", "refreshes"),
    # of 20 steps with T = 5; the switch is the first step before which 1 − fraction of them were done
    [
        (0.0, None, [1, 6, 11, 16]),
        (0.05, 20, [1, 6, 11, 16, 20]),
        (0.25, 16, [1, 6, 11, 16]),
        (0.4, 13, [1, 6, 11, 13, 18]),
        (0.45, 12, [1, 6, 11, 12, 17]),
        (0.5, 11, [1, 6, 11, 16]),
        (0.7, 7, [1, 6, 7, 12, 17]),
        (1.0, 1, [1, 6, 11, 16]),
    ],
)
def test_golore_is_galore_until_the_switch_and_random_from_it_on(
    random_fraction: float, switch: int | None, refreshes: list[int]
) -> None:
    shape = SHAPES["right"]
    size = min(shape)
    initial = noise(shape, "start") * 0.01
    gradients = [spectral(shape, step) for step in range(1, STEPS + 1)]
    parameter = nn.Parameter(initial.clone())
    config = GaLoreConfig(name="galore", block_parameters=["w"], **BASE, **LOW)
    sampler = GoLoreConfig(name="golore", random_fraction=random_fraction)
    optimizer = build_optimizer([("w", parameter)], config, sampler, seed=0, total_steps=STEPS)
    (group,) = optimizer.groups
    seen: dict[int, Tensor] = {}

    def switching(t: int, gradient: Tensor, rank: int, old: Tensor | None) -> Tensor:
        if t not in refreshes:
            assert old is not None
            return old
        if switch is not None and t >= switch:
            return random_bases.haar(random_request(size, rank, refreshes.index(t))).double()
        # the first singular vectors' signs are arbitrary, and matter once moments are kept for a random basis
        return reference.dominant(t, gradient, rank, seen[t])

    before = torch.zeros(size, RANK)
    for step, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient.clone()
        optimizer.step()
        basis = group.state["w"]["basis"]
        assert torch.equal(basis, before) == (step not in refreshes)
        before = basis.clone()
        seen[step] = basis.double()
        # float32 eigenvectors, whose eigenvalues are 0.1 and more apart; haar's are the same
        error = seen[step] - switching(step, gradient.double(), RANK, seen[step])
        assert bool(error.abs().max() < 1e-5)
    own = BASE | {"rank": RANK, "gap": 1}  # ``switching`` knows when
    expected = reference.galore(initial, gradients, sample=switching, **own)
    assert difference(parameter.data, expected, initial) < 1e-4


# --- importance sampling of more than one ----------------------------------------------------------


def sequential(weights: Sequence[float], rank: int) -> dict[tuple[int, ...], float]:
    """P(set) when indices are sampled one after another, each in proportion to the weights that are left."""
    law = {}
    for chosen in combinations(range(len(weights)), rank):
        total = 0.0
        for order in permutations(chosen):
            left, chance = sum(weights), 1.0
            for i in order:
                chance *= weights[i] / left
                left -= weights[i]
            total += chance
        law[chosen] = total
    return law


def by_products(weights: Sequence[float], rank: int) -> dict[tuple[int, ...], float]:
    """P(set) ∝ the product of its weights: sampling with replacement, repeated until they are distinct."""
    products = {s: math.prod(weights[i] for i in s) for s in combinations(range(len(weights)), rank)}
    return {s: product / sum(products.values()) for s, product in products.items()}


@pytest.mark.slow
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("rank", [2, 3])
def test_importance_samples_sets_by_the_sequential_law(rank: int, power: float) -> None:
    weights = [9.0, 3.0, 2.0, 1.2, 1.0]
    values = torch.tensor(weights) ** (1.0 / power)
    size, count = len(weights), 6000
    u, _, vh = torch.linalg.svd(noise((8, size), "vectors").double(), full_matrices=False)
    gram = GradientGram(((u * values) @ vh).float())
    sample_one = partial(importance, power=power)
    found = dict.fromkeys(combinations(range(size), rank), 0)
    for index in range(count):
        request = SampleRequest(size, rank, gram, generator(0, "basis", "w", index), torch.device("cpu"))
        picked = (vh @ sample_one(request).double()).abs().argmax(0)
        found[tuple(picked.tolist())] += 1

    def chi_square(law: dict[tuple[int, ...], float]) -> float:
        return sum((found[s] - count * p) ** 2 / (count * p) for s, p in law.items())

    # 10 sets, so 9 degrees of freedom: 27.9 is exceeded once in a thousand; the rarest set is expected
    # more often than 5 times, as the approximation wants
    law = sequential(weights, rank)
    assert sum(law.values()) == pytest.approx(1.0)
    assert count * min(law.values()) > 5
    assert chi_square(law) < 27.9
    # and this many samples tell it from other laws: expected are 140 and 1250 at least
    assert chi_square(by_products(weights, rank)) > 60
    assert chi_square(sequential(values.tolist() if power != 1.0 else [w**2 for w in weights], rank)) > 60
