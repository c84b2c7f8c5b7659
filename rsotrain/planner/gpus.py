"""Which common GPUs have the memory for a run, and with how many sequences in a micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

from rsotrain.planner.cards import GPUS

# Planning time grows with the chunks of the loss. Beyond so many tokens, peaks are extrapolated linearly.
_MAX_TOKENS = 32768
_MIN_LIMIT = 32  # up to so many sequences are planned in any case, if they may fit
_ENDLESS = 2**40


@dataclass(frozen=True)
class Fit:
    """``fits``: does the run's own micro-batch fit? ``micro_batch``: the largest that fits; 0: none."""

    gpu: str
    examples: str
    usable: int
    fits: bool
    micro_batch: int


def fits(
    peak_of: Callable[[int], int], fixed: int, seq_len: int, micro_batch: int, chunk_tokens: int
) -> list[Fit]:
    """The fit of each GPU. ``peak_of(n)``: the peak of forward and backward passes with n sequences in a
    micro-batch; a call takes time. ``fixed``: the peak of the optimizer's step, which does not depend on n.

    A peak is a maximum of linear functions of n, hence convex, but where the loss begins to divide the tokens
    into chunks of ``chunk_tokens``. The chord between two planned sizes on one side of that therefore lies
    above the true peak, and a size that it says fits does fit. The planned sizes are one sequence, the run's
    own size, the last without chunks and the first with them, and those that the largest and the smallest
    GPU should hold. If the size for the largest
    GPU exceeds 32768 tokens (and 32 sequences), this limit and half of it are planned instead, and the line
    through them is extrapolated.
    """
    undivided = chunk_tokens // seq_len
    sizes = ({1, micro_batch} if micro_batch > 1 else {1, 2}) | {max(1, undivided), undivided + 1}
    curve = _Peaks({size: peak_of(size) for size in sizes}, fixed)
    limit = max(_MIN_LIMIT, _MAX_TOKENS // seq_len)
    largest = curve.largest(max(gpu.usable for gpu in GPUS))
    for size in (limit // 2, limit) if largest > limit else (largest,):
        curve.add(size, peak_of)
    curve.add(min(limit, next((n for gpu in GPUS if (n := curve.largest(gpu.usable))), 1)), peak_of)
    return [
        Fit(
            gpu.size,
            gpu.examples,
            gpu.usable,
            max(fixed, curve.at(micro_batch)) <= gpu.usable,
            curve.largest(gpu.usable),
        )
        for gpu in GPUS
    ]


class _Peaks:
    """Peaks at planned sizes of the micro-batch, linear between and beyond them."""

    def __init__(self, points: dict[int, int], fixed: int) -> None:
        self.points, self.fixed = points, fixed

    def add(self, size: int, peak_of: Callable[[int], int]) -> None:
        if size > 0 and size not in self.points:
            self.points[size] = peak_of(size)

    def at(self, size: int) -> float:
        sizes = sorted(self.points)
        before = max((s for s in sizes[:-1] if s <= size), default=sizes[0])
        after = min(s for s in sizes if s > before)
        slope = (self.points[after] - self.points[before]) / (after - before)
        return self.points[before] + slope * (size - before)

    def largest(self, usable: int) -> int:
        """The largest number of sequences that fits into ``usable`` bytes; 0 if none does."""
        low, high = 0, 1
        if max(self.fixed, self.at(1)) > usable:
            return 0
        while self.at(high) <= usable and high < _ENDLESS:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle) <= usable else (low, middle)
        return low
