"""Cholesky's QR of batches: orthonormal whatever the columns, and equal to Householder's."""

import pytest
import torch
from torch import Tensor

from rsotrain.subspace.orthonormal import cholesky_qr, orthonormalised


def conditioned(size: int, rank: int, condition: float, seed: int = 0) -> Tensor:
    """k×r in float32, with singular values from 1 down to 1/``condition``."""
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(size, rank, generator=random, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(rank, rank, generator=random, dtype=torch.float64))[0]
    exponents = torch.linspace(0, 1, rank, dtype=torch.float64)
    return ((left * condition**-exponents) @ right.T).float()


def error_of(q: Tensor) -> float:
    wide = q.double()
    return float((wide.mT @ wide - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max())


def householder(block: Tensor) -> Tensor:
    q, r = torch.linalg.qr(block)
    return q * r.diagonal().sign()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("shape", [(24, 6), (24, 24), (400, 100), (513, 257)])
def test_as_householders_qr_up_to_conditions_of_1e7(shape: tuple[int, int], condition: float) -> None:
    block = conditioned(*shape, condition)
    q = cholesky_qr(block)
    assert q.dtype is torch.float32
    # the rounding of entries below 1, 6e-8, in sums of random signs over columns of norm 1
    assert error_of(q) < 2e-7 <= error_of(householder(block)) * 2
    # Householder's in float64 resolves what float32 loses: R of condition 1e7 times its errors of 1e-16
    assert float((q.double() - householder(block.double())).abs().max()) < 2e-7


def test_each_matrix_of_a_batch_is_decomposed_as_if_alone() -> None:
    blocks = [conditioned(60, 20, 10.0**i, seed=i) for i in range(8)] + [torch.zeros(60, 20)]
    together = cholesky_qr(torch.stack(blocks))
    for q, block in zip(together, blocks, strict=True):
        assert torch.allclose(q, cholesky_qr(block), atol=2e-7)  # batched products may round differently
    assert torch.equal(orthonormalised(torch.stack(blocks)), together)


RANDOM = torch.Generator().manual_seed(1)
SINGULAR = {
    "zero": torch.zeros(48, 12),
    "zero at full rank": torch.zeros(48, 48),
    "one column": torch.randn(48, 1, generator=RANDOM),
    "equal columns": torch.ones(48, 12),
    "rank 2": torch.randn(48, 2, generator=RANDOM) @ torch.randn(2, 12, generator=RANDOM),
    "rank 2 of full rank": torch.randn(48, 2, generator=RANDOM) @ torch.randn(2, 48, generator=RANDOM),
    "twice the same": torch.randn(48, 12, generator=RANDOM).repeat(1, 2),
    "nearly parallel": torch.ones(24, 6).addcmul(
        torch.eye(24, 6)[:, :1], torch.tensor([0, 1, -1, 1, 2, 0]), value=6e-8
    ),
    "parallel but for one rounding": torch.ones(24, 5)
    * (1 + 1.2e-7 * torch.eye(24, 1)).pow(torch.tensor([0, 1, 1, 2, 1])),
    "some axes": torch.eye(48, 12),
    "some zero": torch.eye(48, 12) * (torch.arange(12) % 2),
    "huge": torch.randn(48, 12, generator=RANDOM) * 1e38,
    "tiny": torch.randn(48, 12, generator=RANDOM) * 1e-38,
    "subnormal": torch.full((48, 3), 1e-42),
    "of many sizes": torch.randn(48, 12, generator=RANDOM) * 10.0 ** torch.linspace(-38, 38, 12),
    "not finite": torch.full((48, 12), torch.nan),
    "infinite": torch.eye(48, 12) / 0.0,
}


@pytest.mark.parametrize("name", SINGULAR)
def test_orthonormal_whatever_the_rank(name: str) -> None:
    assert error_of(cholesky_qr(SINGULAR[name])) < 2e-7


def test_columns_that_depend_on_none_keep_their_place() -> None:
    """What replaces the others does not disturb them: R is upper triangular with a positive diagonal."""
    block = torch.randn(48, 12, generator=torch.Generator().manual_seed(2))
    first = householder(block.double())[:, :7]
    block[:, 7:] = block[:, :5]
    assert float((cholesky_qr(block)[:, :7].double() - first).abs().max()) < 2e-7


def test_no_decomposition_asks_for_the_hosts_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    block = conditioned(40, 10, 100.0)[None]
    for name in ("qr", "svd", "eigh", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, None)
    assert error_of(orthonormalised(block)) < 2e-7
