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

    ``sizes``: (k, r) of each. ``state[name]`` holds ``basis`` (k×r, the first unit vectors until the first
    draw) and the sampler's own tensors. Random numbers come from (seed, name, index of the draw) alone, so
    that bases which depend on no data need not be ``stored``: they are then drawn again, bitwise the same,
    at each use. ``scaled``: what the sampler draws is multiplied by √(k/r), so that E[QQᵀ] = I where it
    was uniformly random and orthonormal.
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
        scaled: bool = False,
        stored: bool = True,
    ) -> None:
        assert stored or not sampler.informed, "data cannot be drawn again"
        self.sizes = sizes
        self.sampler = sampler
        self.schedule = RefreshSchedule(gap, len(sizes), staggered)
        self.seed = seed
        self.total_steps = total_steps
        self.dtype = dtype
        self.devices = devices
        self.scaled = scaled
        self.stored = stored
        self.positions = {name: i for i, name in enumerate(sizes)}
        self.indices = dict.fromkeys(sizes, 0)  # of the draws in use
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, (size, rank) in sizes.items():
            self.state[name] = {"basis": axes(size, rank, devices[name]).to(dtype)} if stored else {}
            for key, shape in sampler.state_shapes(size, rank).items():
                self.state[name][key] = torch.zeros(shape, device=devices[name])
        self.skipped = 0  # draws that a non-finite gradient prevented
        self._refresh_step = 0
        self._refresh_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._overlaps: dict[str, Tensor] = {}
        self._captured: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if self.stored:
            return self.state[name]["basis"]
        return self._drawn(self.request(name, self.indices[name]))

    def resume(self, step: int) -> None:
        """``step`` is the last that the bases in use were drawn for."""
        self.indices = {name: self.schedule.latest(i, step)[0] for name, i in self.positions.items()}

    def request(self, name: str, index: int | str) -> Draw:
        """The draw with this index, without data."""
        size, rank = self.sizes[name]
        device = self.devices[name]
        return Draw(size, rank, None, generator(self.seed, "basis", name, index), device)

    def place(self, name: str, basis: Tensor) -> None:
        """Put an orthonormal ``basis`` in the place of the one in use."""
        size, rank = self.sizes[name]
        kept = self.state[name]["basis"]
        wide = torch.promote_types(self.dtype, basis.dtype)
        kept.copy_(basis.to(wide) * self._scale(size, rank))

    def _drawn(self, draw: Draw) -> Tensor:
        basis = self.sampler.draw(draw)
        if self.scaled:
            wide = torch.promote_types(self.dtype, basis.dtype)
            basis = basis.to(wide) * self._scale(draw.size, draw.rank)
        # one memory layout for all: products with a stored and a regenerated basis are then bitwise equal
        return basis.to(self.dtype).contiguous()

    def _scale(self, size: int, rank: int) -> float:
        return (size / rank) ** 0.5 if self.scaled else 1.0

    def due(self, name: str, step: int, *, after_update: bool) -> bool:
        """Is a draw due at ``step`` before (or after) the weights are updated?"""
        index = self.schedule.draw_index(self.positions[name], step)
        if index is None:
            return False
        return after_update == (self.sampler.lagged and index > 0)

    @torch.no_grad()
    def refresh(
        self,
        name: str,
        gram: Callable[[], Gram | None],
        step: int,
        lr_factor: float,
        index: int | None = None,
    ) -> BasisChange | None:
        """Draw the basis that is due at ``step``, or that of number ``index``.

        ``gram`` is called only if the sampler needs it, and returns None if the gradient is not finite:
        the old basis then stays, which is counted, and warned of once. It also stays if the gradient is
        zero. Returns None at the first draw and where the basis stayed.
        """
        if index is None:
            index = self.schedule.draw_index(self.positions[name], step)
        assert index is not None
        old = self[name]
        self._start_timer(step, old.device)
        try:
            seen = gram() if self.sampler.informed else None
            if self.sampler.informed:
                if seen is None:
                    self._skip(name, step)
                    return None
                if not bool(seen.energy() > 0):
                    return None
            draw = self.request(name, index)
            draw.gram = seen
            draw.progress = (step - 1) / self.total_steps
            draw.lr_factor = lr_factor
            draw.state = self.state[name]
            if index > 0:
                draw.previous = old / self._scale(draw.size, draw.rank) if self.scaled else old
            new = self._drawn(draw)
            change = None
            if step > 1:
                wide = torch.promote_types(old.dtype, torch.float32)
                transition = (new.to(wide).T @ old.to(wide)) / self._scale(draw.size, draw.rank) ** 2
                change = BasisChange(old.clone(), transition)
                if self.sampler.orthonormal:
                    self._overlaps[name] = transition.square().sum() / draw.rank
            self.indices[name] = index
            if self.stored:
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
