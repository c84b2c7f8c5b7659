"""Several matrices in one tensor, so that a GPU treats them by one kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in ``dtype``: themselves, if they have it, else copies that share one memory."""
    if all(tensor.dtype is dtype for tensor in tensors):
        return list(tensors)
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device)
    pieces = flat.split([t.numel() for t in tensors])
    copies = [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One (n, …) tensor of n that are alike: a view of them where they follow each other in memory."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    step = tensors[1].storage_offset() - first.storage_offset()
    storage = first.untyped_storage()._cdata
    if step > 0 and all(
        t.untyped_storage()._cdata == storage and t.storage_offset() == first.storage_offset() + i * step
        for i, t in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
    if first.ndim == 2 and first.stride(0) < first.stride(1):  # as memory has them
        return torch.stack([t.T for t in tensors]).mT
    return torch.stack(list(tensors))


def put_back_(tensors: Sequence[Tensor], stack: Tensor) -> None:
    """Write the parts of a tensor that ``stacked`` has made of ``tensors`` to these, unless it is a view."""
    if stack.untyped_storage()._cdata != tensors[0].untyped_storage()._cdata:
        torch._foreach_copy_(list(tensors), list(stack.unbind()))
