"""The bytes that are alive at each moment of a training step, by their purpose.

The tracker follows the storage of every result of an operation, of real or of fake tensors, from its first
appearance to its release. It does not see memory inside a kernel, such as the workspace of cuBLAS or of an
eigensolver.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsotrain.instruments.phases import Phase
from rsotrain.instruments.work import collective_of
from rsotrain.parallel.sharding import local

CUDA_BLOCK_BYTES = 512  # torch's caching allocator rounds sizes up to a multiple of this


class Kind(Enum):
    """The purpose of bytes. gathered: FSDP's gathered weights and the buffers of its collectives."""

    parameters = "parameters"
    gradients = "gradients"
    optimizer_state = "optimizer state"
    activations = "activations"
    gathered = "gathered"
    temporaries = "temporaries"


@dataclass(eq=False)
class _Storage:
    """The current size of a storage, and its kind; None: not marked yet."""

    nbytes: int
    kind: Kind | None = None
    alive: "weakref.ref[torch.UntypedStorage] | None" = None


# (what, storage, value): ("size", it, its growth), ("kind", it, Kind), ("phase", None, Phase or None)
_Event = tuple[str, _Storage | None, Any]


@dataclass
class Peak:
    """Bytes alive at the moment of most memory, in total and by kind."""

    total: int = 0
    by_kind: dict[Kind, int] = field(default_factory=dict)


class MemoryTracker(TorchDispatchMode):
    """Follows storages while it is entered, inside a FakeTensorMode if there is one.

    ``granularity``: sizes are rounded up to a multiple of so many bytes. ``traffic``: for each forward pass,
    the bytes that this rank puts into collectives until the next one begins, by kind of collective.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()
        self.granularity = granularity
        self.traffic: list[Counter[str]] = []
        self._events: list[_Event] = []
        self._live: dict[int, _Storage] = {}  # by address
        self._phases: list[Phase] = []

    # --- following ---------------------------------------------------------------------------------

    def __enter__(self) -> "MemoryTracker":
        original = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            original(storage, size)
            self._resized(storage)
            return storage

        # FSDP frees and refills gathered weights by resizing their storages, which is no operation
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(getattr(kind, "__name__", "") == "DTensor" for kind in types):
            return NotImplemented  # the operation is dispatched again with the local tensors
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._found(leaf.untyped_storage())
        if func.namespace == "c10d":
            self._collective(func, args)
        return result

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.granularity) * self.granularity

    def _found(self, storage: torch.UntypedStorage) -> _Storage:
        address = storage._cdata
        known = self._live.get(address)
        if known is not None and known.alive is not None and known.alive() is storage:
            return known
        found = _Storage(self._rounded(storage.nbytes()))

        def released(_: Any) -> None:
            self._events.append(("size", found, -found.nbytes))
            found.nbytes = 0
            if self._live.get(address) is found:
                del self._live[address]

        found.alive = weakref.ref(storage, released)
        self._live[address] = found
        self._events.append(("size", found, found.nbytes))
        return found

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._found(storage)
        nbytes = self._rounded(storage.nbytes())
        self._events.append(("size", known, nbytes - known.nbytes))
        known.nbytes = nbytes
        self._mark(known, Kind.gathered)

    def _collective(self, func: Any, args: Any) -> None:
        collective = collective_of(func, args)
        if self.traffic:
            self.traffic[-1][collective.kind] += collective.given
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and collective.kind in ("allgather", "reduce_scatter"):
                found = self._found(leaf.untyped_storage())
                if found.kind is None:
                    self._mark(found, Kind.gathered)

    # --- kinds and phases --------------------------------------------------------------------------

    def mark(self, tensors: Iterable[Tensor | None], kind: Kind) -> None:
        """Give these tensors a kind, from now on, and also before if they had none."""
        for tensor in tensors:
            if tensor is not None:
                self._mark(self._found(local(tensor).untyped_storage()), kind)

    def _mark(self, storage: _Storage, kind: Kind) -> None:
        if storage.kind is not kind:
            storage.kind = kind
            self._events.append(("kind", storage, kind))

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Memory inside belongs to the phase ``name``; phases may nest."""
        self._phases.append(name)
        if name is Phase.forward:
            self.traffic.append(Counter())
        self._events.append(("phase", None, name))
        try:
            yield
        finally:
            self._phases.pop()
            self._events.append(("phase", None, self._phases[-1] if self._phases else None))

    # --- the result --------------------------------------------------------------------------------

    def peaks(self) -> dict[Phase, Peak]:
        """The moment of most memory in each phase that was entered."""
        kinds: dict[_Storage, Kind] = {}
        for what, storage, value in self._events:  # a storage has its first kind from the start
            if what == "kind" and storage is not None:
                kinds.setdefault(storage, value)
        totals = dict.fromkeys(Kind, 0)
        sizes: Counter[_Storage] = Counter()
        peaks: dict[Phase, Peak] = {}
        total, now = 0, None
        for what, storage, value in self._events:
            if what == "phase":
                now = value
            elif what == "size" and storage is not None:
                sizes[storage] += value
                totals[kinds.get(storage, Kind.temporaries)] += value
                total += value
            elif storage is not None:
                totals[kinds[storage]] -= sizes[storage]
                totals[value] += sizes[storage]
                kinds[storage] = value
            if now is not None and total > peaks.setdefault(now, Peak()).total:
                peaks[now] = Peak(total, dict(totals))
        return peaks
