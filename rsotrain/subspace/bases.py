"""The bases of a set of matrices: drawing, replacing and measuring them."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rsotrain.subspace.gram import Gram
from rsotrain.subspace.samplers import Draw, Sampler, axes
from rsotrain.subspace.schedule import RefreshSchedule
from rsotrain.subspace.seeding import generator


@dataclass(frozen=True)
class BasisChange:
    """``transition``: Q_newᵀ Q_old, r×r; ``old``: Q_old, k×r."""

    old: Tensor
    transition: Tensor


class Bases:
    """One basis for each name: draws it when due, and remembers how the last draws went.

    ``state[name]`` holds ``basis`` (k×r, the first unit vectors until the first draw) and the sampler's
    own tensors. Random numbers come from (seed, name, index of the draw) alone.
    """

    def __init__(
        self,
        sizes: dict[str, tuple[int, int]],
        sampler: Sampler,
        *,
        gap: int,
        staggered: bool,
        seed: int,
        total_steps: int,
        dtype: torch.dtype,
        devices: dict[str, torch.device],
    ) -> None:
        self.sampler = sampler
        self.schedule = RefreshSchedule(gap, len(sizes), staggered)
        self.seed = seed
        self.total_steps = total_steps
        self.positions = {name: i for i, name in enumerate(sizes)}
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, (size, rank) in sizes.items():
            basis = axes(size, rank, devices[name]).to(dtype)
            self.state[name] = {"basis": basis} | {
                key: torch.zeros(shape, device=devices[name])
                for key, shape in sampler.state_shapes(size, rank).items()
            }
        self.skipped = 0  # draws that a non-finite gradient prevented
        self._refresh_step = 0
        self._refresh_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._overlaps: dict[str, Tensor] = {}
        self._captured: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]["basis"]

    def due(self, name: str, step: int, *, after_update: bool) -> bool:
        """Is a draw due at ``step`` before (or after) the weights are updated?"""
        index = self.schedule.draw_index(self.positions[name], step)
        if index is None:
            return False
        return after_update == (self.sampler.lagged and index > 0)

    @torch.no_grad()
    def refresh(
        self, name: str, gram: Callable[[], Gram | None], step: int, lr_factor: float
    ) -> BasisChange | None:
        """Draw the basis that is due at ``step``.

        ``gram`` is called only if the sampler needs it, and returns None if the gradient is not finite:
        the old basis then stays, which is counted, and warned of once. It also stays if the gradient is
        zero. Returns None at the first draw and where the basis stayed.
        """
        index = self.schedule.draw_index(self.positions[name], step)
        assert index is not None
        state = self.state[name]
        old = state["basis"]
        self._start_timer(step, old.device)
        try:
            seen = gram() if self.sampler.informed else None
            if self.sampler.informed:
                if seen is None:
                    self._skip(name, step)
                    return None
                if not bool(seen.energy() > 0):
                    return None
            draw = Draw(
                size=old.shape[0],
                rank=old.shape[1],
                gram=seen,
                generator=generator(self.seed, "basis", name, index),
                device=old.device,
                previous=old if step > 1 else None,
                progress=(step - 1) / self.total_steps,
                lr_factor=lr_factor,
                state=state,
            )
            new = self.sampler.draw(draw).to(old.dtype)
            change = None
            if step > 1:
                wide = torch.promote_types(old.dtype, torch.float32)
                transition = new.to(wide).T @ old.to(wide)
                change = BasisChange(old.clone(), transition)
                if self.sampler.orthonormal:
                    self._overlaps[name] = transition.square().sum() / old.shape[1]
            old.copy_(new)
            return change
        finally:
            self._stop_timer(old.device)

    def observe(self, name: str, projected: Tensor, gradient: Tensor) -> None:
        """Note the share of ‖A‖_F² that ‖A Q‖_F² has; ``projected``: A Q (M×r), ``gradient``: A (M×k)."""
        if self.sampler.orthonormal:
            energy, kept = (
                torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square()
                for x in (gradient, projected)
            )
            self._captured[name] = torch.where(energy > 0, kept / energy, 1.0)

    def metrics(self) -> dict[str, float]:
        """``subspace/…`` of each matrix' last draw, mean over matrices; seconds of the last step with draws.

        Overlap and captured energy only mean something for orthonormal bases, and are absent otherwise.
        """
        result = {}
        if self._overlaps:
            result["subspace/overlap"] = float(torch.stack(list(self._overlaps.values())).mean())
        if self._captured:
            result["subspace/captured_energy"] = float(torch.stack(list(self._captured.values())).mean())
        if self._refresh_step:
            seconds = self._refresh_seconds
            for start, end in self._events:
                end.synchronize()
                seconds += start.elapsed_time(end) / 1000
            result["subspace/refresh_seconds"] = seconds
        return result

    def _skip(self, name: str, step: int) -> None:
        self.skipped += 1
        if self.skipped == 1:
            warnings.warn(
                f"step {step}: the gradient of {name} is not finite; its old basis stays"
                " (said once, counted in Bases.skipped)",
                RuntimeWarning,
                stacklevel=3,
            )

    def _start_timer(self, step: int, device: torch.device) -> None:
        if step != self._refresh_step:
            self._refresh_step, self._refresh_seconds = step, 0.0
            self._events.clear()
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            start.record()
            self._events.append((start, torch.cuda.Event(enable_timing=True)))
        else:
            self._started = time.perf_counter()

    def _stop_timer(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._refresh_seconds += time.perf_counter() - self._started
