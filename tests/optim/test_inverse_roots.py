"""Inverse roots of Gram matrices, by eigenvectors and by products."""

import numpy as np
import pytest
import torch
from helpers.samplers import spectrum

from rsotrain.instruments.devices import planning_for
from rsotrain.optim.inverse_roots import inverse_roots, polynomials

RANK = 24


def orthogonalised(matrix: torch.Tensor, kind: str) -> torch.Tensor:
    with planning_for(kind):
        (root,) = inverse_roots([matrix.T @ matrix])
    return matrix @ root


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
@pytest.mark.parametrize(("decay", "tolerance"), [(1.0, 1e-12), (0.8, 1e-10), (0.6, 1e-4)])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_nearest_orthonormal_matrix(kind: str, decay: float, tolerance: float, scale: float) -> None:
    """Condition numbers of 1, 170 and 130,000, whose squares amplify rounding errors."""
    matrix = spectrum(decay ** torch.arange(RANK), dtype=torch.float64) * scale
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float((orthogonalised(matrix, kind) - left @ right).abs().max()) < tolerance


def test_a_singular_value_that_the_first_polynomial_takes_to_nearly_nothing() -> None:
    a, b, c = polynomials()[0]
    places = torch.linspace(0.5, 1.0, 100_001, dtype=torch.float64)
    dip = float(places[(a * places + b * places**3 + c * places**5).abs().argmin()])
    values = torch.full((RANK,), ((1 - dip**4) / (RANK - 1)) ** 0.25, dtype=torch.float64)
    values[0] = dip  # of a Gram matrix of norm 1
    matrix = spectrum(values, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float((orthogonalised(matrix, "cuda") - left @ right).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_directions_without_momentum_stay_without(kind: str) -> None:
    values = torch.where(torch.arange(RANK) < 3, 1.0, 1e-9)
    result = torch.linalg.svdvals(orthogonalised(spectrum(values, dtype=torch.float64), kind))
    assert float((result[:3] - 1.0).abs().max()) < 1e-9
    assert float(result[3:].max()) < 1e-2
    assert not orthogonalised(torch.zeros(8, RANK, dtype=torch.float64), kind).any()


def test_the_polynomials_take_all_that_is_no_noise_to_one() -> None:
    values = np.geomspace(16 * 2.0**-23, 1.0, 10_001)
    for a, b, c in polynomials():
        values = a * values + b * values**3 + c * values**5
    assert np.abs(values - 1.0).max() < 1e-12
    assert len(polynomials()) == 12  # as each makes the least values 8.5 times as large, at first
