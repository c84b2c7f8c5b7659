"""Live bytes of a training step, by part."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from rsotrain.parallel.sharding import local


@dataclass
class SavedBytes:
    total: int = 0


def tensors_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the elements of ``tensors`` on this rank; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in (local(t) for t in tensors if t is not None))


def memory_metrics(parts: dict[str, int], peak_bytes: int, device_kind: str) -> dict[str, float]:
    """``parts`` and the peak as ``memory/…``; on a GPU also what of the peak is neither of these parts.

    A CPU's peak is the whole process's, Python and libraries in it, so there is nothing to subtract from.
    """
    metrics: dict[str, float] = {**parts, "memory/peak_bytes": peak_bytes}
    if device_kind == "cuda":
        metrics["memory/gathered_and_temporaries_bytes"] = max(0, peak_bytes - sum(parts.values()))
    return metrics


@contextmanager
def saved_activation_bytes(
    live: Iterable[torch.Tensor], note: Callable[[torch.Tensor], None] = lambda _: None
) -> Iterator[SavedBytes]:
    """Count what autograd keeps for the backward pass of the forward pass inside the block.

    Each storage is counted once however many views of it are saved. ``live``: parameters and optimizer
    state, which are there in any case and not counted; casts of parameters are. ``note`` gets each tensor
    that is counted.
    """
    saved = SavedBytes()
    # Weak references: the hooks live until the backward pass has ended, and must not keep what it frees.
    # While there is one to a storage, its address is not used again.
    seen = {StorageWeakRef(local(t).untyped_storage()) for t in live}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter):  # gathered by FSDP: its memory is not that of the shard
            return tensor
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference not in seen:
            seen.add(reference)
            saved.total += tensor.untyped_storage().nbytes()
            note(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
