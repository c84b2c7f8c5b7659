"""What differs between the tensors of a model and those of a file, in one sentence's words."""

from collections.abc import Mapping

import torch

# Shape and dtype; None where the dtype does not matter.
Described = tuple[tuple[int, ...], torch.dtype | None]


def first_difference(here: Mapping[str, Described], there: Mapping[str, Described]) -> str | None:
    """ "NAME is 64x32 there and 64x48 in this model", of the first name in which they differ; else None."""
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            return f"there is no {name}, which this model has ({_words(here[name])})"
        if name not in here:
            return f"there is {name} ({_words(there[name])}), which this model lacks"
        if here[name] != there[name]:
            return f"{name} is {_words(there[name])} there and {_words(here[name])} in this model"
    return None


def _words(described: Described) -> str:
    shape, dtype = described
    size = "x".join(map(str, shape)) or "a number"
    return size if dtype is None else f"{size} in {str(dtype).removeprefix('torch.')}"
