"""Several matrices of one shape in one tensor, so that a GPU treats them by one kernel.

A stack is (n, …). A CPU has stacks of one matrix, which are views; only there do products run matrix by
matrix, as products of one have the rounding errors that old runs had.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from rsotrain.instruments.devices import device_kind
from rsotrain.parallel.sharding import Shard
from rsotrain.subspace import projection

# Bytes of one temporary of a stack. Three or four of them are alive at a time; kernels of that size take some
# 0.2 ms on an H100, fifty times as long as a launch.
STACK_BYTES = 1 << 28


def in_stacks(device: torch.device) -> bool:
    """Are matrices of one shape updated together there?"""
    return device_kind(device) == "cuda"


def stacks_of(
    parameters: Mapping[str, Tensor],
    kind_of: Callable[[str], Hashable],
    shards: Mapping[str, Shard],
    itemsize: int,
) -> list[list[str]]:
    """The names of ``parameters`` by kind, in stacks of at most ``STACK_BYTES`` at ``itemsize`` each."""
    if not all(in_stacks(parameter.device) for parameter in parameters.values()):
        return [[name] for name in parameters]
    kinds: dict[Hashable, list[list[str]]] = {}
    for name in parameters:
        stacks = kinds.setdefault(kind_of(name), [])
        most = STACK_BYTES // (itemsize * max(1, math.prod(shards[name].shape)))
        if not stacks or len(stacks[-1]) >= most:
            stacks.append([])
        stacks[-1].append(name)
    return [stack for stacks in kinds.values() for stack in stacks]


def zeros_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros like each of ``tensors``; parts of one tensor on a GPU."""
    if len({t.shape for t in tensors}) > 1 or not in_stacks(tensors[0].device):
        return [torch.zeros_like(t) for t in tensors]
    first = tensors[0]
    return list(first.new_zeros((len(tensors), *first.shape)).unbind())


def products(left: Tensor, right: Tensor) -> Tensor:
    """A B of each pair, (n, …)."""
    return (left[0] @ right[0]).unsqueeze(0) if len(left) == 1 else torch.bmm(left, right)


def products_with(matrices: Tensor, vectors: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha·A v of each pair: (n, m, k) and (n, k)."""
    if len(matrices) == 1:
        product = (matrices[0] @ vectors[0]).unsqueeze(0)
        return product if alpha == 1.0 else product.mul_(alpha)
    if alpha == 1.0:
        return torch.bmm(matrices, vectors.unsqueeze(2)).squeeze(2)
    own = matrices[..., :1]  # of the product's shape, and not read
    return torch.baddbmm(own, matrices, vectors.unsqueeze(2), beta=0.0, alpha=alpha).squeeze(2)


def grams_of(vectors: Tensor) -> Tensor:
    """X Xᵀ of each X (n, m, k), n×m×m in at least float32."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    if vectors.is_cuda and vectors.dtype is torch.bfloat16:
        return torch.bmm(vectors, vectors.mT, out_dtype=wide)
    vectors = vectors.to(wide)
    return torch.bmm(vectors, vectors.mT)


def product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """Their elementwise product, rounded once to ``dtype``; either may broadcast."""
    shape = torch.broadcast_shapes(left.shape, right.shape)
    return torch.mul(left, right, out=torch.empty(shape, dtype=dtype, device=left.device))


def norms_of_each(stack: Tensor) -> Tensor:
    """The Frobenius norm of each matrix in at least float32, (n,)."""
    dtype = torch.promote_types(stack.dtype, torch.float32)
    if len(stack) == 1:
        return torch.linalg.vector_norm(stack[0], dtype=dtype).unsqueeze(0)
    return torch.linalg.vector_norm(stack, dim=(1, 2), dtype=dtype)


def norms_of_wholes(shard: Shard, *stacks: Tensor) -> list[Tensor]:
    """The same of whole matrices, from stacks of this rank's pieces, all laid out as ``shard`` says."""
    norms = [norms_of_each(stack) for stack in stacks]
    return norms if shard.dim is None else list(shard.sum_(torch.stack(norms).square_()).sqrt_())


def add_lifted_(
    target: Tensor, low_rank: Tensor, basis: Tensor, alpha: float, decay_factor: float = 1.0
) -> None:
    """``projection.add_lifted_`` for each of n: target ← decay_factor · target + alpha · low_rank Qᵀ."""
    if len(target) == 1:
        projection.add_lifted_(target[0], low_rank[0], basis[0], alpha, decay_factor)
        return
    factor = low_rank.to(basis.dtype)
    in_rows = target.is_contiguous()
    left, right = (factor, basis.mT) if in_rows else (basis, factor.mT)
    out = target if in_rows else target.mT
    if target.dtype == basis.dtype:
        out.baddbmm_(left, right, beta=decay_factor, alpha=alpha)
        return
    if decay_factor != 1.0:
        out.mul_(decay_factor)
    out.add_(torch.bmm(left, right), alpha=alpha)


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
        t.untyped_storage()._cdata == storage
        and t.storage_offset() == first.storage_offset() + i * step
        and t.stride() == first.stride()
        for i, t in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
    if first.ndim == 2 and first.stride(0) < first.stride(1):  # as memory has them
        return torch.stack([t.T for t in tensors]).mT
    return torch.stack(list(tensors))


def is_copy(stack: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Has ``stacked`` made new memory of ``tensors``?"""
    return stack.untyped_storage()._cdata != tensors[0].untyped_storage()._cdata


def put_back_(tensors: Sequence[Tensor], stack: Tensor) -> None:
    """Write the parts of a tensor that ``stacked`` has made of ``tensors`` to these, unless it is a view."""
    if is_copy(stack, tensors):
        torch._foreach_copy_(list(tensors), list(stack.unbind()))
