"""When a basis changes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RefreshSchedule:
    """At steps 1, 1+T, 1+2T, … (1-based, T = ``gap``); all matrices at once, or staggered.

    Staggered, all are drawn at step 1 and matrix i of n then at 1 + ⌊iT/n⌋ + jT: no step carries them all.
    At step ``restart`` (2 or later) the schedule begins anew, with a draw of all.
    """

    gap: int
    num_matrices: int
    staggered: bool
    restart: int | None = None

    def refresh_index(self, position: int, step: int) -> int | None:
        """0 for the first draw of matrix ``position``, 1 for the next, …; None: ``step`` has no refresh."""
        index, since = self.latest(position, step)
        return index if since == 0 else None

    def latest(self, position: int, step: int) -> tuple[int, int]:
        """(index of the last draw of matrix ``position`` up to ``step``, steps since then)."""
        if self.restart is None or step < self.restart:
            return self._latest(position, step)
        before, _ = self._latest(position, self.restart - 1)
        index, since = self._latest(position, step - self.restart + 1)
        return before + 1 + index, since

    def offset(self, position: int) -> int:
        """Steps by which the draws of matrix ``position`` come after 1 + jT."""
        return position * self.gap // self.num_matrices if self.staggered else 0

    def _latest(self, position: int, step: int) -> tuple[int, int]:
        offset = self.offset(position)
        since = step - 1 - offset
        if since < 0:
            return 0, step - 1
        return since // self.gap + (1 if offset else 0), since % self.gap
