"""Attention that stays inside documents: a mask where it must be, or where documents begin.

A mask has (seq_len)² entries and rules out the flash kernels. A GPU of today takes the beginnings of
sequences of different lengths instead, and its memory stays linear in seq_len.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rsotrain.instruments.devices import device_kind

_FLASH_CAPABILITY = (8, 0)  # of the CUDA device
_FLASH_HEAD_SIZE = 256
_FEWEST = 16  # beginnings that are padded to, so that few shapes are compiled


class Documents(NamedTuple):
    """``starts``: (number + 1,) int32: where each begins in the flattened (batch · seq_len), and the end of
    the last; some are empty at the end. ``longest``: an upper bound of their lengths, in tokens."""

    starts: Tensor
    longest: int


def documents_of(tokens: Tensor, separator_id: int, device: torch.device) -> Documents:
    """On ``device``. A separator begins a document, and so does a sequence. tokens: (batch, seq_len).

    Their number is known only after tokens on a device have been waited for; those on the host cost nothing.
    """
    batch, seq_len = tokens.shape
    begins = tokens == separator_id
    begins[:, 0] = True
    found = begins.flatten().nonzero().flatten()
    size = max(_FEWEST, 1 << len(found).bit_length())
    starts = torch.full((size + 1,), batch * seq_len, dtype=torch.int32, device=tokens.device)
    starts[: len(found)] = found
    if device.type == "cuda" and not tokens.is_cuda:
        starts = starts.pin_memory()  # whose copy does not block the host
    return Documents(starts.to(device, non_blocking=True), seq_len)


def document_mask(tokens: Tensor, separator_id: int) -> Tensor:
    """Which tokens each token attends to: those before it in its document, and itself.

    A separator begins a document. tokens: (batch, seq_len). Returns bool (batch, 1, seq_len, seq_len).
    """
    documents = (tokens == separator_id).cumsum(1)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


def takes_documents(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Has the device a flash kernel for them? Not for float32, nor for GPUs before Ampere."""
    if device_kind(device) != "cuda" or dtype.itemsize != 2 or head_size > _FLASH_HEAD_SIZE:
        return False
    # in a plan the tensors are on another device than the run's, which is taken for a new one
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FLASH_CAPABILITY


def attention(
    query: Tensor, key: Tensor, value: Tensor, within: Tensor | Documents | None, *, grouped: bool
) -> Tensor:
    """Causal attention: (batch, seq_len, heads, head_dim) each, and so the result.

    ``within``: the mask of what is attended to, or the documents; None: all that came before. ``grouped``:
    key and value have fewer heads.
    """
    if isinstance(within, Documents):
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        return _within_documents(q, k, v, within, grouped).view_as(query)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=within,
        is_causal=within is None,
        enable_gqa=grouped,
    )
    return attended.transpose(1, 2)


def _within_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, grouped: bool
) -> Tensor:
    """(tokens, heads, head_dim) each, and so the result."""
    from torch.nn.attention.varlen import varlen_attn  # which takes a second to import

    starts, longest = documents
    attended = varlen_attn(
        query, key, value, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=grouped
    )
    assert isinstance(attended, Tensor)
    return attended
