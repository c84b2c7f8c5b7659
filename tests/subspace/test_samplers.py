"""Samplers: orthonormal whatever the gradient, right in what they claim, reproducible."""

import pytest
import torch
from helpers.samplers import BUILT, GRADIENTS, ORTHONORMAL, RANK, ROWS, SIZE, spectrum
from torch import Tensor

from rsotrain.subspace import random_bases, spectral
from rsotrain.subspace.gram import DenseGram, GradientGram, add_gram_, mirrored_
from rsotrain.subspace.online_pca import online_pca, pca_gradient
from rsotrain.subspace.samplers import SampleRequest
from rsotrain.subspace.seeding import generator
from rsotrain.subspace.spectral import eigenbasis


def request_of(gradient: Tensor | None, rank: int = RANK, index: int = 0, **own: object) -> SampleRequest:
    size = SIZE if gradient is None else gradient.shape[1]
    gram = None if gradient is None else GradientGram(gradient)
    return SampleRequest(size, rank, gram, generator(0, "test", index), torch.device("cpu"), **own)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, RANK, SIZE])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_orthonormal_for_every_gradient(name: str, gradient: str, rank: int) -> None:
    previous = None
    for index in range(2):
        request = request_of(GRADIENTS[gradient], rank, index, previous=previous)
        basis = ORTHONORMAL[name](request)
        assert basis.shape == (SIZE, rank)
        assert basis.dtype is torch.float32
        # Householder and eigh: a few roundings of 6e-8 per entry of 24-term sums
        assert bool((basis.T @ basis - torch.eye(rank)).abs().max() < 5e-6)
        previous = basis


@pytest.mark.parametrize("shape", [(40, 24), (24, 24), (33, 30)])
@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_svd_captures_what_the_exact_svd_captures(shape: tuple[int, int], decay: float) -> None:
    gradient = spectrum(decay ** torch.arange(shape[1]), rows=shape[0])
    exact = torch.linalg.svdvals(gradient.double())[:RANK].square().sum()
    basis = spectral.svd(request_of(gradient)).double()
    # eigenvalues err by eps relative to the largest: 1e-7, some digits lost in the accumulation
    assert float((gradient.double() @ basis).square().sum() / exact) > 1 - 1e-6


@pytest.mark.parametrize(("decay", "decompositions"), [(0.5, 0), (0.1, 0), (0.01, 1)])
def test_falls_back_to_more_exact_decompositions(
    decay: float, decompositions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The r-th singular vector itself is right, however far its σ lies below the first."""
    gradient = spectrum(decay ** torch.arange(SIZE, dtype=torch.float64), dtype=torch.float64)
    exact = torch.linalg.svd(gradient)[2]
    calls = []
    original = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(a) or original(*a, **k))
    vectors = spectral.svd(request_of(gradient)).double()
    assert bool(((vectors * exact[:RANK].T).sum(0).abs() > 0.99).all())
    assert len(calls) == decompositions


def test_rounding_noise_is_no_reason_for_an_svd() -> None:
    """A rank-2 gradient from float32 arithmetic has noise below: no exact decomposition of that."""
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(ROWS, 2, generator=random) @ torch.randn(2, SIZE, generator=random)
    values, _ = eigenbasis(GradientGram(gradient), lambda found: bool(found[RANK - 1] > 0))
    assert int((values > 0).sum()) < RANK  # the SVD would have given RANK positive values


def test_dense_gram_gives_the_same_basis_as_the_gradient() -> None:
    gradient = GRADIENTS["ordinary"]
    dense = DenseGram(gradient.double().T @ gradient.double())
    request = request_of(gradient)
    request.gram = dense
    overlap = spectral.svd(request).T @ spectral.svd(request_of(gradient))
    assert float(overlap.square().sum()) == pytest.approx(RANK, abs=1e-5)
    assert spectral.randomized_svd(request, rounds=2).shape == (SIZE, RANK)
    assert float(dense.energy() / dense.normalised.diagonal().sum()) == pytest.approx(1.0)


def test_gram_products_agree() -> None:
    gradient = torch.randn(50, SIZE, generator=torch.Generator().manual_seed(0)) * 1e5
    gram = GradientGram(gradient)
    exact = gram.matrix(torch.float64)
    block = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(gram.matrix(torch.float32).double(), exact, atol=1e-5)
    assert torch.allclose(gram.matmul(block).double(), exact @ block.double(), atol=1e-4)
    assert torch.allclose(gram.diagonal(), exact.diagonal())
    assert torch.allclose(gram.energy(), exact.trace())
    scale = gradient.double().abs().max()
    assert torch.allclose(exact * scale**2, gradient.double().T @ gradient.double(), rtol=1e-5, atol=1e4)


def test_randomized_svd_finds_nearly_all_energy_and_improves_from_the_basis_in_use() -> None:
    gradient = spectrum((torch.arange(200) + 1.0) ** -0.75, rows=300)
    exact = float(torch.linalg.svdvals(gradient)[:50].square().sum())

    def share(basis: Tensor) -> float:
        return float((gradient @ basis).square().sum()) / exact

    cold = spectral.randomized_svd(request_of(gradient, 50), rounds=2)
    assert share(cold) > 0.99
    warm = spectral.randomized_svd(request_of(gradient, 50, previous=cold), rounds=1)
    assert share(cold) < share(warm) <= 1 + 1e-5


@pytest.mark.parametrize(("name", "principal"), [("svd", RANK), ("golore", RANK), ("mixture", RANK // 2)])
def test_what_stands_for_eigenvectors_on_a_gpu_captures_nearly_as_much(name: str, principal: int) -> None:
    gradient = spectrum(0.9 ** torch.arange(SIZE))
    exact = float(torch.linalg.svdvals(gradient.double())[:principal].square().sum())
    previous, energies = None, []
    for index in range(4):
        previous = BUILT[f"{name}-on_gpu"].sample(request_of(gradient, index=index, previous=previous))
        energies.append(float((gradient @ previous[:, :principal]).square().sum()) / exact)
    # a tenth between neighbours' singular values is what power iterations find slowest; random: a quarter
    assert energies[0] > 0.85
    assert energies[3] > 0.98


def test_randomized_svd_finds_a_gradient_that_has_left_the_basis_in_use() -> None:
    # the rows of the gradient live on axes that the basis in use does not touch, and on half of them only
    gradient = torch.zeros(ROWS, SIZE)
    gradient[:, SIZE // 2 :] = spectrum(0.5 ** torch.arange(SIZE // 2))
    previous = torch.eye(SIZE, RANK)
    basis = spectral.randomized_svd(request_of(gradient, previous=previous), rounds=2)
    exact = torch.linalg.svdvals(gradient)[:RANK].square().sum()
    assert float((gradient @ basis).square().sum() / exact) > 0.99


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_eigh_is_passed_over(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    gradient = spectrum(0.9 ** torch.arange(SIZE))
    expected = spectral.svd(request_of(gradient))
    eigh, calls = torch.linalg.eigh, []

    def sometimes(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix)
        if len(calls) <= failing:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    for gram in (GradientGram(gradient), DenseGram(gradient.T @ gradient)):
        calls.clear()
        monkeypatch.setattr(torch.linalg, "eigh", sometimes)
        request = request_of(gradient)
        request.gram = gram
        basis = spectral.svd(request)
        assert len(calls) == 2
        # the same subspace: cosines of the principal angles are 1
        assert torch.allclose(torch.linalg.svdvals(basis.T @ expected), torch.ones(RANK), atol=1e-4)


def test_importance_selects_everything_at_full_rank_and_ascends() -> None:
    gradient = GRADIENTS["ordinary"]
    everything = spectral.importance(request_of(gradient, SIZE), power=1.0)
    dominant = spectral.svd(request_of(gradient, SIZE))
    assert torch.equal(everything, dominant)
    exact = torch.linalg.svd(gradient)[2]
    for index in range(20):
        some = spectral.importance(request_of(gradient, RANK, index), power=1.0)
        picked = (exact @ some).abs().argmax(0)
        assert bool((picked.diff() > 0).all())


@pytest.mark.slow
def test_importance_samples_in_proportion_to_the_singular_values() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    gradient = spectrum(values)
    exact = torch.linalg.svd(gradient, full_matrices=False)[2]
    count = 4000
    for power in (1.0, 2.0):
        picked = torch.zeros(4)
        for index in range(count):
            basis = spectral.importance(request_of(gradient, 1, index), power=power)
            picked[(exact @ basis).abs().argmax()] += 1
        share = values**power / (values**power).sum()
        # 4 standard deviations of a frequency in 4000 samples
        assert bool(((picked / count - share).abs() < 4 * (share * (1 - share) / count).sqrt()).all())


def test_importance_leaves_what_has_no_weight_to_the_last() -> None:
    gradient = GRADIENTS["rank 2"]
    basis = spectral.importance(request_of(gradient, 2), power=1.0)
    assert torch.allclose((gradient @ basis).norm(), gradient.norm())


def test_signs_follow_the_basis_in_use() -> None:
    gradient = GRADIENTS["ordinary"]
    basis = spectral.svd(request_of(gradient))
    flipped = basis * torch.tensor([-1.0, 1.0] * (RANK // 2))
    assert torch.allclose(spectral.svd(request_of(gradient, previous=flipped)), flipped, atol=1e-6)


def test_axes_samplers_pick_distinct_axes() -> None:
    columns = torch.tensor([0.1, 5.0, 0.2, 4.0, 0.0, 3.0])
    gradient = torch.ones(8, 1) * columns
    basis = spectral.topk_norm(request_of(gradient, 3))
    assert basis.argmax(0).tolist() == [1, 3, 5]
    axes = random_bases.coordinate(request_of(None)).argmax(0)
    assert bool((axes.diff() > 0).all())


def test_gaussian_and_haar_have_the_moments_they_claim() -> None:
    count, size, rank = 4000, 6, 3
    for sampler, expected in ((random_bases.gaussian, 1.0), (random_bases.haar, rank / size)):
        total = torch.zeros(size, size)
        for index in range(count):
            request = SampleRequest(size, rank, None, generator(0, index), torch.device("cpu"))
            basis = sampler(request)
            total += basis @ basis.T
        # E[PPᵀ] is a multiple of I; the mean of 4000 samples of variance below 1 errs by 0.016
        assert bool((total / count - expected * torch.eye(size)).abs().max() < 0.06)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 12, 96, 43])
def test_srht_is_orthonormal_and_spread_out_for_every_size(size: int) -> None:
    basis = random_bases.srht(
        SampleRequest(size, size, None, generator(0, size), torch.device("cpu"))
    ).double()
    assert bool((basis.T @ basis - torch.eye(size)).abs().max() < 1e-6)
    odd = size
    while odd % 2 == 0:
        odd //= 2
    # no entry is larger than √2 (cosines; 1 for a power of two) times that of a flat vector
    assert float(basis.abs().max()) <= (2.0**0.5 if odd > 1 else 1.0) * size**-0.5 + 1e-6


def test_golore_changes_over_on_a_gpu_too() -> None:
    gradient = GRADIENTS["rank 2"]
    late = BUILT["golore-on_gpu"].sample(request_of(gradient, switched=True))
    assert torch.equal(late, random_bases.haar(request_of(gradient)))


def test_golore_changes_over_at_its_share_of_the_run() -> None:
    gradient = GRADIENTS["ordinary"]
    assert torch.equal(spectral.golore(request_of(gradient)), spectral.svd(request_of(gradient)))
    switched = request_of(gradient, switched=True)
    assert torch.equal(spectral.golore(switched), random_bases.haar(request_of(gradient)))


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_pca_gradient_is_autograds(penalty: float) -> None:
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(ROWS, SIZE, generator=random, dtype=torch.float64)
    basis = torch.randn(SIZE, RANK, generator=random, dtype=torch.float64, requires_grad=True)
    unit = gradient / gradient.norm()
    gap = basis.T @ basis - torch.eye(RANK)
    loss = (unit @ basis @ basis.T - unit).square().sum() + penalty * gap.square().sum()
    (expected,) = torch.autograd.grad(loss, basis)
    found = pca_gradient(GradientGram(gradient), basis.detach(), penalty)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_online_pca_comes_to_the_dominant_subspace() -> None:
    gradient = spectrum(torch.tensor([3.0, 2.5, 2.0, 0.3, 0.2, 0.1]))
    basis = random_bases.haar(request_of(gradient, 3))
    before = (gradient @ torch.linalg.qr(basis)[0]).square().sum() / gradient.square().sum()
    for _ in range(300):
        request = request_of(gradient, 3, previous=basis)
        basis = online_pca(request, lr=0.1, penalty=0.1, use_adam=False, orthonormalize=False)
    after = (gradient @ torch.linalg.qr(basis)[0]).square().sum() / gradient.square().sum()
    best = torch.linalg.svdvals(gradient)[:3].square().sum() / gradient.square().sum()
    assert before < 0.9 * best
    assert after > 0.999 * best


def test_samples_depend_on_seed_name_and_index_only() -> None:
    def noise(*labels: str | int) -> Tensor:
        return torch.randn(8, generator=generator(0, *labels))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = noise("basis", "a", 0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    assert torch.equal(first, noise("basis", "a", 0))
    for other in (
        noise("basis", "a", 1),
        noise("basis", "b", 0),
        torch.randn(8, generator=generator(1, "basis", "a", 0)),
    ):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [5, 128, 300, 1100])
def test_the_gram_matrix_made_of_its_lower_blocks_is_the_whole_one(size: int) -> None:
    rows = torch.randn(7, size, dtype=torch.float64)
    total = torch.full((size, size), torch.nan, dtype=torch.float64)
    total.tril_().nan_to_num_(0.0)  # the blocks on the diagonal reach above it
    for half in rows.split(4):
        add_gram_(total, half)
    # sums of 7 products each; nothing of what lay above the blocks may be left
    torch.testing.assert_close(mirrored_(total), rows.T @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_energy_is_that_of_a_sum_in_float64(transposed: bool) -> None:
    a = torch.randn(3000, 500) if not transposed else torch.randn(500, 3000).T
    gram = GradientGram(a)
    exact = gram.normalised.double().square().sum()
    torch.testing.assert_close(gram.energy(), exact, rtol=1e-5, atol=0.0)  # columns' sums are float32
