"""How the last draws of a set of bases went: what is logged as ``subspace/…``."""

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
    """Of all bases that one method draws. Where draws come more often than every ten steps (``gap``), not
    all are measured.

    ``mesh``: of the ranks that have the same bases; they call ``metrics`` together. ``unobserved``: what was
    drawn since it was seen by ``observe``. ``skipped``: how many draws failed in this process.
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
        """Is draw number ``index`` of a basis one to measure?"""
        return index == 0 or index % self._every == 1 % self._every

    def sampled(self, name: str, overlap: Tensor | None) -> None:
        """Note a measured draw, and its overlap with the basis before if there was one."""
        self.unobserved.add(name)
        if overlap is not None:
            self._overlaps[name] = overlap

    def observe(self, name: str, gradient: Tensor, projected: Tensor, copies: int = 1) -> None:
        """Note the share of ‖A‖_F² that lies in the subspace.

        ``gradient``: A (M×k); ``projected``: A on an orthonormal basis of the subspace (M×r). Of both the
        pieces that are here; of the latter there are ``copies`` in all.
        """
        self.unobserved.discard(name)
        energy, kept = (
            torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square()
            for x in (gradient, projected)
        )
        self._captured[name] = torch.stack([kept / copies, energy])

    def skip(self, name: str, step: int, reason: str, waiting: bool) -> None:
        """Count a draw that failed, and warn of the first. ``waiting``: there is no basis yet."""
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
        """Add the time of what is inside to that of the draws of ``step``."""
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
        """``subspace/…`` of each matrix' last measured draw, mean over matrices; seconds of the last step
        with draws; how many draws failed in this process, once one has. May synchronise.
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
