"""Batches that training passes over, instead of ending: those not finite, and those whose gradient spikes."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rsotrain.errors import NonFiniteError

WINDOW = 64  # gradient norms of the last updates, whose median a spike is measured against
MIN_NORMS = 16  # before there are so many, nothing is a spike

_COUNT, _NORMS = "bad_steps", "gradient_norms"


@dataclass
class BadSteps:
    """A count of the batches that were skipped, and what the next one is judged by; all ranks have the same.

    A batch is bad if its loss or the norm of its gradient, before clipping, is not finite, or if that norm is
    more than ``spike_factor`` times the median of the last ``WINDOW`` updates' (None: never). ``limit``: how
    many may be skipped in the whole run. ``updated``: the judgement comes after the update. It takes the loss
    and the norm that are read for the log anyway, so that the host waits for nothing else.
    """

    limit: int = 0
    spike_factor: float | None = None
    updated: bool = False
    count: int = 0
    norms: list[float] = field(default_factory=list)

    def verdict(self, step: int, loss: float, norm: float) -> str:
        """Why the batch is to be skipped; empty for a good one, whose norm is remembered.

        Raises NonFiniteError for a bad one where none may be skipped any more.
        """
        reason = self._reason(loss, norm)
        if not reason:
            if self.spike_factor is not None:
                self.norms.append(norm)
                del self.norms[:-WINDOW]
            return ""
        if self.count >= self.limit:
            skipped = f", and max_bad_steps={self.limit} batches have been skipped" if self.limit else ""
            when = "after" if self.updated else "before"
            raise NonFiniteError(f"step {step}: {reason}{skipped}: stopped {when} the update")
        self.count += 1
        return f"step {step}: {reason}: batch skipped ({self.count} of at most {self.limit})"

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        if self.spike_factor is None or len(self.norms) < MIN_NORMS:
            return ""
        usual = statistics.median(self.norms)
        if norm <= self.spike_factor * usual:
            return ""
        return f"the gradient norm is {norm:.4g}, and the median of the last {len(self.norms)} {usual:.4g}"

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's record: plain values, none where there is nothing to remember."""
        state = {_COUNT: self.count, _NORMS: list(self.norms)}
        return {key: value for key, value in state.items() if value}

    def restored(self, record: Mapping[str, Any]) -> "BadSteps":
        """With the state in a trainer's record. Raises TypeError where that is damaged."""
        count, norms = record.get(_COUNT, 0), record.get(_NORMS, [])
        whole = isinstance(count, int) and isinstance(norms, list)
        if not whole or not all(isinstance(norm, int | float) for norm in norms):
            raise TypeError(f"{_COUNT} or {_NORMS} is damaged")
        return replace(self, count=count, norms=[float(norm) for norm in norms[-WINDOW:]])
