"""SOAP: against a float64 transcription of its paper, in limits, and the bases that it tracks."""

from dataclasses import replace

import pytest
import torch
from helpers.one_matrix import (
    BASE,
    BETAS,
    EPS,
    LR,
    PRECISIONS,
    SHAPES,
    build,
    error_of,
    gradients,
    run,
    start,
)
from torch import Tensor, nn

from rsotrain.config.methods import AdamConfig, SoapConfig
from rsotrain.config.samplers import NoSamplerConfig
from rsotrain.optim import reference_full_rank as reference
from rsotrain.optim.eigenbases import first_bases, refreshed_bases

NONE = NoSamplerConfig(name="none")
SOAP = SoapConfig(name="soap", eigenbasis_betas=BETAS, precondition_frequency=3, **BASE)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(config: SoapConfig | AdamConfig, grads: list[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    parameter = nn.Parameter(torch.zeros(grads[0].shape, dtype=dtype))
    return run(build(parameter, config, NONE), parameter, grads)


def theirs(weight: Tensor, grads: list[Tensor], frequency: int, longest: int) -> Tensor:
    return reference.soap(
        weight, grads, lr=LR, betas=BETAS, eps=EPS, frequency=frequency, longest=longest, weight_decay=0.1
    )


@pytest.mark.parametrize(("longest", "frequency"), [(24, 3), (24, 10), (10, 1), (10, 3), (10, 10)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_twenty_steps_of_float64_equal_the_reference(side: str, longest: int, frequency: int) -> None:
    """With both bases, and with that of the shorter side alone. In float64 the shift is 10⁻¹⁵.

    Not (24, 1): at the second refresh L has the rank 20 of 24, and the paper's QR decides by rounding errors.
    """
    shape = SHAPES[side]
    config = replace(SOAP, precondition_frequency=frequency, max_preconditioner_dim=longest)
    weight, grads = start(shape).double(), gradients(shape)
    parameter = nn.Parameter(weight.clone())
    ours = run(build(parameter, config, NONE), parameter, grads)
    expected = theirs(weight, grads, frequency, longest)
    assert float((ours - expected).abs().max() / (expected - weight).abs().max()) < 1e-6


# Most eigenvalues of the larger side are noise of 10⁻⁴ of the largest, of which the shift is 10⁻²; float32
# resolves 10⁻⁶, and Adam makes all directions equally large. In bf16 the weight itself is rounded 20 times.
TOLERANCE = {"fp32": 0.01, "bf16_mixed": 0.01, "bf16": 0.03}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("side", SHAPES)
def test_twenty_steps_equal_the_reference(side: str, precision: str) -> None:
    config = replace(SOAP, precondition_frequency=7)
    error = error_of(config, NONE, lambda w, g: theirs(w, g, 7, 24), SHAPES[side], precision)
    assert error < TOLERANCE[precision]


@pytest.mark.parametrize("shape", SHAPES.values())
def test_with_the_identity_on_both_sides_it_is_adam(shape: tuple[int, int]) -> None:
    grads = [noise(*shape, seed=i) for i in range(15)]
    soap = moved(replace(SOAP, max_preconditioner_dim=1), grads, torch.float32)
    adam = moved(AdamConfig(name="adam", **BASE), grads, torch.float32)
    # both divide and take roots in float32 in another order: a few units in the last place a step
    assert torch.allclose(soap, adam, rtol=1e-5, atol=1e-7)


def test_diagonal_gradients_keep_the_axes() -> None:
    """Eigenvectors of diagonal L and R are axes, in which SOAP is Adam from the second gradient on."""
    sizes = torch.arange(6, 0, -1, dtype=torch.float64)
    grads = [torch.diag(sizes * (1 + 0.1 * noise(6, seed=i))) for i in range(12)]
    soap = moved(SOAP, grads)  # from 0, of which the first step's decay takes nothing
    adam = moved(AdamConfig(name="adam", **BASE), grads[1:])
    assert torch.allclose(soap, adam, rtol=1e-9, atol=1e-12)


def test_a_rotation_of_the_weights_rotates_their_way() -> None:
    """As Adam's does not: coordinates are the eigenbases', whichever the weights have."""
    grads = [noise(8, 8, seed=i) for i in range(12)]
    left, right = (torch.linalg.qr(noise(8, 8, seed=50 + i))[0] for i in range(2))
    turned = [left @ gradient @ right.T for gradient in grads]
    for config, same in ((SOAP, True), (AdamConfig(name="adam", **BASE), False)):
        expected, found = left @ moved(config, grads) @ right.T, moved(config, turned)
        assert torch.allclose(found, expected, rtol=0, atol=1e-7) is same


def test_the_first_gradient_gives_the_bases_alone() -> None:
    parameter = nn.Parameter(torch.zeros(8, 6))
    optimizer = build(parameter, SOAP, NONE)
    parameter.grad = noise(8, 6).float()
    optimizer.step()
    assert not parameter.any()
    state = optimizer.state_dict()
    assert not state["w.exp_avg"].any()
    g = parameter.grad
    for key, gram in (("left", g @ g.T), ("right", g.T @ g)):
        basis = state[f"w.{key}_basis"]
        within = basis.T @ gram @ basis
        assert torch.allclose(within, within.diagonal().diag(), atol=1e-4)
        assert bool((within.diagonal().diff() <= 1e-4).all())
    optimizer.step()
    assert bool(parameter.ne(0).all())


def test_gradients_of_zero_move_nothing_and_spoil_nothing() -> None:
    grads = [torch.zeros(8, 6)] * 4 + [noise(8, 6, seed=i) for i in range(3)]
    assert not moved(SOAP, grads[:4], torch.float32).any()
    weight = moved(SOAP, grads, torch.float32)
    assert weight.isfinite().all()
    assert weight.any()


# --- the bases --------------------------------------------------------------------------------------------


def positive(size: int, rank: int, seed: int = 0) -> Tensor:
    """A positive matrix with eigenvalues 1, 1/2, 1/4, …, and 0 beyond ``rank``."""
    vectors = torch.linalg.qr(noise(size, size, seed=seed))[0]
    values = 0.5 ** torch.arange(size, dtype=torch.float64) * (torch.arange(size) < rank)
    return (vectors * values) @ vectors.T


def assert_orthonormal(bases: Tensor) -> None:
    one = torch.eye(bases.shape[-1], dtype=bases.dtype)
    assert torch.allclose(bases.mT @ bases, one.expand_as(bases), atol=1e-5)


@pytest.mark.parametrize("rank", [12, 5])
def test_first_bases_are_eigenvectors(rank: int) -> None:
    matrices = torch.stack([positive(12, rank, seed=i) for i in range(3)]).float()
    found = first_bases(matrices, torch.zeros_like(matrices))
    assert_orthonormal(found)
    within = found.mT @ matrices @ found
    expected = torch.diag(0.5 ** torch.arange(12.0) * (torch.arange(12) < rank))
    assert torch.allclose(within, expected.expand_as(within), atol=1e-5)


def test_a_null_space_has_the_same_basis_whatever_the_rounding_errors() -> None:
    matrix = positive(12, 5).unsqueeze(0).float()
    errors = [1e-7 * (e + e.T) for e in (noise(12, 12, seed=1).float(), noise(12, 12, seed=2).float())]
    one, other = (first_bases(matrix + error, torch.zeros_like(matrix)) for error in errors)
    signs = (one * other).sum(-2, keepdim=True).sign()  # LAPACK's
    assert torch.allclose(one, other * signs, atol=1e-4)


def test_matrices_that_say_nothing_leave_their_bases() -> None:
    old = torch.linalg.qr(noise(3, 6, 6))[0].float()
    matrices = torch.stack([torch.zeros(6, 6), torch.full((6, 6), torch.nan), positive(6, 6).float()])
    found = first_bases(matrices, old)
    assert torch.equal(found[:2], old[:2])
    assert not torch.allclose(found[2], old[2], atol=0.1)
    kept = refreshed_bases(torch.zeros(2, 6, 6), old[:2])
    assert torch.allclose(kept, old[:2], atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_rounds_of_power_iteration_find_the_eigenvectors(count: int) -> None:
    """Each round divides what neighbours have of each other by the ratio of their eigenvalues, here 2."""
    matrices = torch.stack([positive(8, 8, seed=i) for i in range(count)]).float()
    bases = torch.eye(8).expand(count, 8, 8)
    for _ in range(40):
        bases = refreshed_bases(matrices @ bases, bases)
        assert_orthonormal(bases)
    within = bases.mT @ matrices @ bases
    assert torch.allclose(within, torch.diag(0.5 ** torch.arange(8.0)).expand_as(within), atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_matrix_leaves_open_stays_as_it_is(count: int) -> None:
    """A matrix of rank 3 turns none of the columns that are orthogonal to its range."""
    matrix = positive(8, 3).float()
    bases = first_bases(matrix.expand(count, 8, 8).contiguous(), torch.zeros(count, 8, 8))
    again = refreshed_bases(matrix @ bases, bases)
    assert torch.allclose(again[:, :, 3:].abs(), bases[:, :, 3:].abs(), atol=0.02)
