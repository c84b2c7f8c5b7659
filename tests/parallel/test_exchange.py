"""The collectives of our own beside torch's, on three ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ranks

from rsotrain.parallel import exchange
from rsotrain.parallel.ranks import World

SIZE, LENGTH = 3, 5
DTYPES = (torch.float32, torch.bfloat16)


def results(world: World) -> dict[str, bool]:
    group = dist.group.WORLD
    assert group is not None
    assert exchange.is_direct(group)
    found = {}
    for dtype in DTYPES:
        random = torch.Generator().manual_seed(world.rank)
        # whole numbers: their sums are exact in bfloat16, in any order
        pieces = torch.randint(-9, 9, (SIZE * LENGTH,), generator=random).to(dtype)
        out, expected = torch.empty(LENGTH, dtype=dtype), torch.empty(LENGTH, dtype=dtype)
        exchange.reduce_scatter(out, pieces.clone(), group).wait()
        dist.reduce_scatter_single(expected, pieces.clone())
        found[f"sum of {dtype}"] = torch.equal(out, expected)

        piece = pieces[:LENGTH]
        whole, expected = torch.zeros(SIZE * LENGTH, dtype=dtype), torch.zeros(SIZE * LENGTH, dtype=dtype)
        dist.all_gather_single(expected, piece)
        exchange.all_gather(whole, piece, group).wait()
        found[f"pieces of {dtype}"] = torch.equal(whole, expected)
        # as FSDP calls it: the piece lies in its place already
        whole = torch.zeros(SIZE * LENGTH, dtype=dtype)
        own = whole[world.rank * LENGTH : (world.rank + 1) * LENGTH].copy_(piece)
        exchange.all_gather(whole, own, group).wait()
        found[f"pieces of {dtype}, in place"] = torch.equal(whole, expected)
    return found


def order(world: World) -> list[bytes]:
    """The bits of sums that rounding makes depend on their order, from three calls."""
    group = dist.group.WORLD
    assert group is not None
    pieces = torch.randn(SIZE * LENGTH, generator=torch.Generator().manual_seed(world.rank))
    out = torch.empty(LENGTH)
    found = []
    for _ in range(3):
        exchange.reduce_scatter(out, pieces, group).wait()
        found.append(out.numpy().tobytes())
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return ranks.run(SIZE, {"results": results, "order": order}, Path(tmp_path_factory.mktemp("exchange")))


def test_they_give_what_torchs_give(outcomes: dict[str, list[Any]]) -> None:
    for found in ranks.succeeded(outcomes["results"]):
        assert len(found) == 3 * len(DTYPES)
        assert all(found.values()), found


def test_sums_are_bitwise_repeatable(outcomes: dict[str, list[Any]]) -> None:
    for found in ranks.succeeded(outcomes["order"]):
        assert len(set(found)) == 1
