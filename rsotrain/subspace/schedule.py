"""The steps at which bases are refreshed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RefreshSchedule:
    """Refreshes at steps 1, 1+T, 1+2T, … (1-based, T = ``gap``, update_proj_gap).

    ``staggered``: all matrices are refreshed at step 1, and then matrix i of n at 1 + ⌊iT/n⌋ + jT, which
    spreads the work over the T steps. At step ``restart`` (2 or later) the schedule begins again, with a
    refresh of all matrices.
    """

    gap: int
    num_matrices: int
    staggered: bool
    restart: int | None = None

    def refresh_index(self, position: int, step: int) -> int | None:
        """Index (0, 1, …) of the refresh of matrix ``position`` at ``step``; None if there is none."""
        index, since = self.latest(position, step)
        return index if since == 0 else None

    def latest(self, position: int, step: int) -> tuple[int, int]:
        """(index of the last refresh of matrix ``position`` up to ``step``, steps since then)."""
        if self.restart is None or step < self.restart:
            return self._latest(position, step)
        before, _ = self._latest(position, self.restart - 1)
        index, since = self._latest(position, step - self.restart + 1)
        return before + 1 + index, since

    def offset(self, position: int) -> int:
        """Steps by which the refreshes of matrix ``position`` come after 1 + jT."""
        return position * self.gap // self.num_matrices if self.staggered else 0

    def _latest(self, position: int, step: int) -> tuple[int, int]:
        offset = self.offset(position)
        since = step - 1 - offset
        if since < 0:
            return 0, step - 1
        return since // self.gap + (1 if offset else 0), since % self.gap
