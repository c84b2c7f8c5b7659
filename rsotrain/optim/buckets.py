"""Matrices in buckets, which bound what an update makes on the way."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

# Matrices are updated in buckets whose temporaries have at most so many elements each: 32 MiB in float32.
BUCKET_ELEMENTS = 1 << 23

Item = TypeVar("Item")


def buckets(
    items: Iterable[Item], size: Callable[[Item], int], limit: int = BUCKET_ELEMENTS
) -> list[list[Item]]:
    """Split ``items``, in order, into runs of at most ``limit`` elements; a larger item gets its own run."""
    result: list[list[Item]] = []
    filled = 0
    for item in items:
        if not result or filled + size(item) > limit:
            result.append([])
            filled = 0
        result[-1].append(item)
        filled += size(item)
    return result


def chosen(
    buckets: Iterable[Sequence[Item]], names: Collection[str], name_of: Callable[[Item], str] = str
) -> list[list[Item]]:
    """Of each bucket the items with these names; no empty buckets."""
    own = ([item for item in bucket if name_of(item) in names] for bucket in buckets)
    return [bucket for bucket in own if bucket]
