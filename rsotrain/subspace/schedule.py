"""When a basis changes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RefreshSchedule:
    """At steps 1, 1+T, 1+2T, … (1-based, T = ``gap``); all matrices at once, or staggered.

    Staggered, all are drawn at step 1 and matrix i of n then at 1 + ⌊iT/n⌋ + jT: no step carries them all.
    """

    gap: int
    num_matrices: int
    staggered: bool

    def draw_index(self, position: int, step: int) -> int | None:
        """0 for the first draw of matrix ``position``, 1 for the next, …; None: ``step`` has no refresh."""
        if step == 1:
            return 0
        offset = position * self.gap // self.num_matrices if self.staggered else 0
        since = step - 1 - offset
        if since < 0 or since % self.gap:
            return None
        return since // self.gap + (1 if offset else 0)
