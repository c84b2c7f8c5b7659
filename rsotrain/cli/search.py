"""Where to try next, when one number is tuned: by a factor, until the best has worse ones beside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rsotrain.config.ranges import Range


@dataclass(frozen=True)
class Ladder:
    """The values that may be tried: ``start`` · ``factor``^k, k the number of a rung.

    ``allowed``: what the key takes. ``lowest``, ``highest``: what the user allows of it, both included.
    A ``whole`` number is rounded.
    """

    start: float
    factor: float
    allowed: Range | None = None
    lowest: float | None = None
    highest: float | None = None
    whole: bool = False

    def value(self, rung: int) -> float | None:
        """None beyond the ends, and for a rung that rounds to the one before it, seen from ``start``."""
        value = self._value(rung)
        inside = (
            (self.lowest is None or value >= self.lowest)
            and (self.highest is None or value <= self.highest)
            and (self.allowed is None or value in self.allowed)
        )
        inner = rung - 1 if rung > 0 else rung + 1
        return value if inside and (rung == 0 or value != self._value(inner)) else None

    def _value(self, rung: int) -> float:
        exact = self.start * self.factor**rung
        return round(exact) if self.whole else float(f"{exact:.12g}")  # 0.3, not 0.30000000000000004


@dataclass(frozen=True)
class Best:
    """``inside``: have both neighbours been tried, and are they worse?"""

    rung: int
    loss: float
    inside: bool


def following(losses: Mapping[int, float], ladder: Ladder) -> list[int]:
    """The rungs to try next, none of which is in vain, whatever the others give; none at the end.

    ``losses``: rung -> validation loss, inf of a run that diverged. The best needs both neighbours. Where
    all have diverged, a smaller value is next, and a larger one when there is none.
    """
    if not losses:
        return [rung for rung in (0, -1, 1) if ladder.value(rung) is not None]
    best = _best_rung(losses)
    if best is None:
        outer = (min(losses) - 1, max(losses) + 1)
        return [rung for rung in outer if ladder.value(rung) is not None][:1]
    return [rung for rung in (best - 1, best + 1) if rung not in losses and ladder.value(rung) is not None]


def best_of(losses: Mapping[int, float]) -> Best | None:
    """The rung of the lowest loss, of equal ones the lower; None where all have diverged."""
    rung = _best_rung(losses)
    if rung is None:
        return None
    return Best(rung, losses[rung], inside={rung - 1, rung + 1} <= losses.keys())


def _best_rung(losses: Mapping[int, float]) -> int | None:
    finite = [(loss, rung) for rung, loss in losses.items() if math.isfinite(loss)]
    return min(finite)[1] if finite else None
