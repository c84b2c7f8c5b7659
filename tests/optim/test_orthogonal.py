"""Rows made orthonormal in groups."""

import pytest
import torch

from rsotrain.optim.orthogonal import newton_schulz, orthogonal_groups, rows_of_group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_singular_values_come_to_lie_around_one(dtype: torch.dtype) -> None:
    stack = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.linalg.svdvals(newton_schulz(stack, 5).float())
    assert bool((values > 0.65).all() and (values < 1.25).all())  # the polynomial's range, with some rounding


def test_zeros_stay_zeros_and_no_group_changes_another() -> None:
    random = torch.Generator().manual_seed(0)
    matrices = [torch.randn(rows, 8, generator=random) for rows in (6, 7, 4)]
    matrices[0][3:] = 0
    together = orthogonal_groups(matrices, [3, 3, 2], 5)
    assert torch.equal(together[0][3:], torch.zeros(3, 8))
    for matrix, rows, found in zip(matrices, [3, 3, 2], together, strict=True):
        assert found.shape == matrix.shape
        for part, alone in zip(matrix.split(rows), found.split(rows), strict=True):
            assert torch.allclose(
                newton_schulz(part[None], 5)[0], alone, atol=1e-5
            )  # products in another order


@pytest.mark.parametrize(
    ("group", "size", "rows"), [(0.25, 128, 32), (0.25, 3, 1), (1.0, 7, 7), (64, 48, 48), (1, 9, 1)]
)
def test_a_group_is_a_number_or_a_fraction_of_the_shorter_side(
    group: int | float, size: int, rows: int
) -> None:
    assert rows_of_group(group, size) == rows
