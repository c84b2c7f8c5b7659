"""Counts what a GPU would be asked for, from fake CUDA tensors: launches, host syncs, mixed devices."""

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rsotrain
from rsotrain.instruments.launches import PER_PANEL, is_free, launches_of, operation_name
from rsotrain.instruments.phases import Phase, watching

_PACKAGE = str(Path(rsotrain.__file__).parent)
# Operations after which the host waits: a value goes to it, a result has a size that it must know, or it asks
# whether a decomposition has converged.
_VALUES = ("_local_scalar_dense", "equal")
_SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
_DECOMPOSITIONS = ("_linalg_eigh", "_linalg_svd", "_linalg_check_errors")
_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
_CHECKING = ("linalg_cholesky_ex", "linalg_inv_ex", "linalg_solve_ex")  # with check_errors=True
_WAITING = (*_VALUES, *_SIZES, *_DECOMPOSITIONS)


class GpuWatch(TorchDispatchMode):
    """``launches``: number of kernels by phase of the step, in ``operations`` by (phase, operation).

    ``syncs``: how often the host waits for the device, by place in the package. ``flops``: of matrix
    products, Cholesky factors and solutions, by (phase, dtype); ``decomposed``: the matrices whose
    eigenvectors or singular vectors are taken, by their smaller side. ``problems``: what a GPU would refuse.
    """

    def __init__(self) -> None:
        super().__init__()
        self._idle = False  # the host has waited, and launched nothing since
        self._phase = "other"
        self.launches: Counter[str] = Counter()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.syncs: Counter[str] = Counter()
        self.flops: Counter[tuple[str, str]] = Counter()
        self.decomposed: Counter[int] = Counter()
        self.problems: Counter[str] = Counter()

    def clear(self) -> None:
        """Forget what was counted, but for problems."""
        for counter in (self.launches, self.operations, self.syncs, self.flops, self.decomposed):
            counter.clear()

    @contextmanager
    def phases(self) -> Iterator[None]:
        """Count launches by phase inside."""

        @contextmanager
        def watch(name: Phase) -> Iterator[None]:
            before, self._phase = self._phase, name.value
            try:
                yield
            finally:
                self._phase = before

        with watching(watch):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._check_devices(func, name, args, kwargs, inputs)
        result = func(*args, **kwargs)
        tensors = [*inputs, *(x for x in tree_leaves(result) if isinstance(x, Tensor))]
        if any(x.is_cuda for x in tensors) and not is_free(func, name):
            number = launches_of(name, args, inputs)
            self._idle = False
            self.launches[self._phase] += number
            self.operations[self._phase, name] += number
            self._count_work(name, inputs, result)
        return result

    def _count_work(self, name: str, inputs: Sequence[Tensor], result: Any) -> None:
        if name in ("_linalg_eigh", "_linalg_svd"):
            self.decomposed[min(inputs[0].shape[-2:])] += inputs[0][..., 0, 0].numel()
        elif name in _PRODUCTS:
            left = inputs[-2]  # addmm's first is the summand
            self.flops[self._phase, _dtype(left)] += 2 * result.numel() * left.shape[-1]
        elif name in PER_PANEL:
            size, factor = inputs[0].shape[-1], 1 if name == "linalg_solve_triangular" else 1 / 3
            columns = inputs[-1] if name == "linalg_solve_triangular" else inputs[0]
            self.flops[self._phase, _dtype(columns)] += int(factor * size * columns.numel())

    def _check_devices(self, func: Any, name: str, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> None:
        kinds = {x.device.type for x in inputs if x.dim() > 0}
        on_gpu = "cuda" in {x.device.type for x in inputs}
        generator = kwargs.get("generator")
        if generator is not None:
            device = inputs[0].device if inputs else torch.device(kwargs.get("device") or "cpu")
            if generator.device.type != device.type:
                self.problems[
                    f"{name}: a generator of {generator.device.type} on {device.type}{self._where()}"
                ] += 1
        if func.namespace == "aten" and name in ("_to_copy", "copy_"):
            self._check_copy(name, args, kwargs, inputs)
        elif name.startswith(("index", "_index")) and on_gpu:
            for index in (x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor)):
                if index.dtype is torch.bool:
                    self.syncs["a boolean index" + self._where()] += 1
                elif not index.is_cuda:
                    self.syncs["an index on the CPU" + self._where()] += 1
        elif len(kinds) > 1:
            self.problems[f"{name}: tensors of {' and '.join(sorted(kinds))}{self._where()}"] += 1
        checks = name in _CHECKING and (kwargs.get("check_errors") or args[-1] is True)
        if on_gpu and (name in _WAITING or checks):
            if not self._idle:
                self.syncs[name + self._where()] += 1
            self._idle = True
        if name.startswith("_fused"):
            lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
            for of_one in zip(*lists[:4], strict=True):
                if len({(x.dtype, x.device, x.shape, x.stride()) for x in of_one}) > 1:
                    self.problems[f"{name}: one dtype, device and layout for all lists{self._where()}"] += 1

    def _check_copy(self, name: str, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> None:
        if name == "copy_":
            target, source = inputs[0].device.type, inputs[1].device.type
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            source = inputs[0].device.type
            target = torch.device(kwargs.get("device") or source).type
            blocking = not kwargs.get("non_blocking")
        if source != target and blocking:
            self.syncs[f"a copy from {source} to {target}" + self._where()] += 1

    def _where(self) -> str:
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(_PACKAGE):
                return f" at {frame.filename[len(_PACKAGE) + 1 :]}:{frame.lineno}"
        return ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
