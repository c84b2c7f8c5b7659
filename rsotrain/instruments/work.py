"""What a step asks of a device: FLOPs, bytes of its memory, kernels, and bytes between ranks.

Counted operation by operation, of real or of fake tensors. What a kernel reads twice from memory, or once
for two operations as compiled code does, is not seen.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsotrain.instruments.launches import PER_MATRIX, is_free, launches_of, operation_name
from rsotrain.instruments.phases import Phase

# Which arguments the factors begin with.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
_NOT_READ = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_full", "new_ones")
_ONLY_WRITTEN = (
    "copy_",
    "fill_",
    "zero_",
    "normal_",
    "uniform_",
    "random_",
    "_foreach_copy_",
    "_foreach_zero_",
)
_PICKING = ("embedding", "gather", "index", "index_select")
_SCATTERING = ("scatter_", "scatter_add_", "index_add_", "index_copy_", "index_put_")


class Bound(Enum):
    """What the FLOPs of an operation are done at the rate of."""

    bfloat16 = "bfloat16 products"
    float32 = "float32 products"
    float64 = "float64 products"
    attention = "attention"
    decomposition = "decompositions"
    decomposition64 = "decompositions in float64"
    nothing = "no products"


class Operation(NamedTuple):
    """``nbytes``: read and written on the device. ``sent``: bytes that pass this rank's link, in a group of
    ranks whose last is ``last_rank``."""

    bound: Bound
    flops: int
    nbytes: int
    launches: int
    sent: int = 0
    last_rank: int = 0


Work = Counter[Operation]


class Collective(NamedTuple):
    """``given``: bytes that this rank puts in."""

    kind: str
    given: int
    group: Any  # the process group


def collective_of(func: Any, args: Sequence[Any]) -> Collective:
    """Of an operation of the namespace c10d."""
    kind = operation_name(func).strip("_").replace("_base", "")
    # inputs come second where there are outputs of their own
    given = args[1] if kind in ("allgather", "reduce_scatter", "gather", "scatter") else args[0]
    return Collective(kind, _bytes_of(x for x in tree_leaves(given) if isinstance(x, Tensor)), _group(args))


def _group(args: Sequence[Any]) -> Any:
    for x in args:
        if isinstance(x, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(x)
            except RuntimeError:  # another of torch's objects
                continue
    return None


class WorkCounter(TorchDispatchMode):
    """``sections``: (phase, what was asked for in it), a section for each time that a phase was entered;
    None: outside of all phases. A refresh within the update is a section of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[Phase | None, Work]] = [(None, Work())]
        self._open = [0]  # indices of sections

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        self._open.append(len(self.sections))
        self.sections.append((name, Work()))
        try:
            yield
        finally:
            self._open.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(getattr(kind, "__name__", "") == "DTensor" for kind in types):
            return NotImplemented  # the operation is dispatched again with the local tensors
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operation = _operation(func, args, kwargs, result)
        if operation is not None:
            self.sections[self._open[-1]][1][operation] += 1
        return result

    def of_step(self, micro_batches: int) -> dict[Phase | None, Work]:
        """Of a step with so many micro-batches, of which the first and the last were counted."""
        by_phase: dict[Phase | None, list[Work]] = defaultdict(list)
        for phase, work in self.sections:
            by_phase[phase].append(work)
        result: dict[Phase | None, Work] = {}
        for phase, works in by_phase.items():
            total = result[phase] = Work()
            passes = phase in (Phase.forward, Phase.backward)
            for work in works[-1:] if passes else works:
                total.update(work)
            if passes:
                for operation, number in works[0].items():
                    total[operation] += number * (micro_batches - 1)
        return result


def _operation(func: Any, args: Any, kwargs: Any, result: Any) -> Operation | None:
    name = operation_name(func)
    if func.namespace == "c10d":
        return _sending(func, args)
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if is_free(func, name) or not (inputs or outputs):
        return None
    bound, flops = _flops(func, name, args, kwargs)
    nbytes = _traffic(func, name, args, kwargs, inputs, outputs)
    return Operation(bound, flops, nbytes, launches_of(name, args, inputs))


def _sending(func: Any, args: Any) -> Operation | None:
    kind, given, group = collective_of(func, args)
    ranks = dist.get_process_group_ranks(group) if group is not None else [0]
    size = len(ranks)
    passed = {
        "allgather": given * (size - 1),
        "reduce_scatter": given * (size - 1) // size,
        "allreduce": 2 * given * (size - 1) // size,
    }.get(kind, given)
    return Operation(Bound.nothing, 0, 0, 1, sent=passed, last_rank=max(ranks)) if given else None


def _flops(func: Any, name: str, args: Any, kwargs: Any) -> tuple[Bound, int]:
    if name in _PRODUCTS:
        a, b = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        return _bound_of_products(a.dtype), 2 * a.numel() * b.shape[-1]
    if "scaled_dot_product" in name or name.startswith("_varlen_attn"):
        return Bound.attention, _attention_flops(func, name, args, kwargs)
    if name in PER_MATRIX or name == "linalg_cholesky_ex":
        a = args[0]
        rows, columns = sorted(a.shape[-2:], reverse=True)
        batch = a.shape[:-2].numel()
        # Golub and Van Loan, Matrix Computations: tridiagonal reduction, QR iteration and vectors; R and Q of
        # a QR decomposition; both sides of an SVD
        each = {
            "_linalg_eigh": 9 * rows**3,
            "linalg_qr": 4 * rows * columns**2,
            "_linalg_svd": 20 * rows * columns**2,
            "linalg_cholesky_ex": rows**3 // 3,
            "linalg_householder_product": 2 * rows * columns**2,
        }
        wide = a.dtype is torch.float64
        return Bound.decomposition64 if wide else Bound.decomposition, batch * each[name]
    return Bound.nothing, 0


def _bound_of_products(dtype: torch.dtype) -> Bound:
    by_width = {8: Bound.float64, 4: Bound.float32}
    return by_width.get(dtype.itemsize, Bound.bfloat16)


def _attention_flops(func: Any, name: str, args: Any, kwargs: Any) -> int:
    """Of two products forward and five backward; half of them where a token sees those before it alone."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    query = given["query"]
    if name.startswith("_varlen_attn"):  # (tokens, heads, head_dim), of sequences of at most max_q
        pairs, causal = query.numel() * int(given["max_q"]), True
    else:  # (batch, heads, seq_len, head_dim)
        pairs, causal = query.numel() * given["key"].shape[-2], bool(given.get("is_causal"))
    return pairs * (10 if "backward" in name else 4) // (2 if causal else 1)


def _traffic(
    func: Any, name: str, args: Any, kwargs: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> int:
    if name in _PICKING:
        return 2 * _bytes_of(outputs) + _bytes_of(x for x in inputs if not x.is_floating_point())
    if name in _SCATTERING:  # what is named is read, added to, and written
        return 3 * _bytes_of(inputs[1:])
    read = [] if name in _NOT_READ else inputs
    of_outputs = kwargs.get("out")
    total = _bytes_of([*read, *outputs])
    if of_outputs is None and name.endswith("_") and name not in _ONLY_WRITTEN:
        written = (
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        total += _bytes_of(x for x in tree_leaves(list(written)) if isinstance(x, Tensor))
    return total


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements that are there; each tensor once, and a dimension that repeats none not again."""
    seen: dict[int, int] = {}
    for x in tensors:
        kept = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0]
        seen[id(x)] = torch.Size(kept).numel() * x.element_size()
    return sum(seen.values())
