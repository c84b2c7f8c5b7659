"""The metrics ``subspace/…`` of the last refreshes of a set of bases."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RefreshRecord:
    """Measures the refreshes of one method, one in about ten steps where they are more frequent (``gap``).

    ``mesh``: the ranks that have the same bases; they call ``metrics`` together. ``unobserved``: names of
    bases that were sampled and for which ``observe`` has not been called since. ``skipped``: number of
    refreshes that failed in this process.
    """

    def __init__(self, gap: int, mesh: "DeviceMesh | None") -> None:
        self._every = max(1, 10 // gap)  # measuring costs about a projection
        self.mesh = mesh
        self.unobserved: set[str] = set()
        self.skipped = 0
        self._step = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._overlaps: dict[str, Tensor] = {}
        self._captured: dict[str, Tensor] = {}

    def measures(self, index: int) -> bool:
        """Is the refresh ``index`` of a basis measured?"""
        return index == 0 or index % self._every == 1 % self._every

    def sampled(self, name: str, overlap: Tensor | None) -> None:
        """Record a measured refresh; ``overlap``: with the old basis, None at the first refresh."""
        self.unobserved.add(name)
        if overlap is not None:
            self._overlaps[name] = overlap

    def observe(self, name: str, gradient: Tensor, projected: Tensor, copies: int = 1) -> None:
        """Record the share of ‖A‖_F² that lies in the subspace.

        ``gradient``: this rank's piece of A (M×k); ``projected``: this rank's piece of A Q (M×r), where Q is
        an orthonormal basis of the subspace; ``copies``: the number of ranks that have this piece of A Q.
        """
        self.unobserved.discard(name)
        energy, kept = (
            torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square()
            for x in (gradient, projected)
        )
        self._captured[name] = torch.stack([kept / copies, energy])

    def skip(self, name: str, step: int, reason: str, waiting: bool) -> None:
        """Count a refresh that failed, and warn of the first. ``waiting``: there is no basis yet."""
        self.skipped += 1
        if self.skipped == 1:
            stays = "nothing is projected yet" if waiting else "its old basis stays"
            warnings.warn(
                f"step {step}: the gradient of {name} {reason}; {stays}"
                " (said once, counted in subspace/skipped_draws)",
                RuntimeWarning,
                stacklevel=3,
            )

    @contextmanager
    def timing(self, step: int, device: torch.device) -> Iterator[None]:
        """Add the time spent inside to the refresh time of ``step``."""
        if step != self._step:
            self._step, self._seconds = step, 0.0
            self._events.clear()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((start, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """``subspace/…``: means over matrices of the last measured refresh of each; the seconds that the last
        step with refreshes spent on them; the number of failed refreshes in this process, unless it is 0. May
        synchronise with the device.
        """
        result: dict[str, float] = {}
        if self._overlaps:
            result["subspace/overlap"] = float(torch.stack(list(self._overlaps.values())).mean())
        if self._captured:
            sums = torch.stack(list(self._captured.values()))
            if self.mesh is not None:
                dist.all_reduce(sums)
            kept, energy = sums.unbind(1)
            result["subspace/captured_energy"] = float(torch.where(energy > 0, kept / energy, 1.0).mean())
        if self._step:
            seconds = self._seconds
            for start, end in self._events:
                end.synchronize()
                seconds += start.elapsed_time(end) / 1000
            result["subspace/refresh_seconds"] = seconds
        if self.skipped:
            result["subspace/skipped_draws"] = self.skipped
        return result
