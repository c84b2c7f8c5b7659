"""The range of every number of the configuration: declared with its field, checked by one walk."""

import dataclasses
import math
from typing import Any

from omegaconf import MISSING

from rsotrain.errors import require

# Upper ends where the mathematics has none. What lies beyond is a slip of the hand, and would end in a loop
# without end, an overflow or an error of the memory.
COUNT = 10**12  # steps, tokens, documents, seeds: products with sizes still fit into 63 bits
SIZE = 10**7  # rows or columns of a matrix
FACTOR = 10**12  # factors, and limits that are to have no effect
SMALL = 1e-30  # what is to prevent a division by 0, also in float32

_RANGES = "ranges"  # of a field's metadata
_WORDS = ("no numbers", "one number", "two numbers", "three numbers", "four numbers")
_ORDINALS = ("first", "second", "third", "fourth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """An interval with two ends, each of which belongs to it (``at_least``, ``at_most``) or does not."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        assert (self.at_least is None) != (self.above is None), "a range has one lower end"
        assert (self.at_most is None) != (self.below is None), "a range has one upper end"

    def __contains__(self, value: float) -> bool:
        return self._is_high_enough(value) and self._is_low_enough(value)

    def __str__(self) -> str:
        low = f"({self.above:_}" if self.at_least is None else f"[{self.at_least:_}"
        high = f"{self.below:_})" if self.at_most is None else f"{self.at_most:_}]"
        return f"{low}, {high}"

    def demand(self, value: float) -> str:
        """What a value outside of the range must do, as the end of a sentence.

        Numbers are written so that the command line takes them: 1_000_000.
        """
        if 1 in (self.at_most, self.below):  # a fraction, of which both ends are of interest
            return f"must lie in {self}"
        if not self._is_high_enough(value):
            if self.above is not None:
                return "must be positive" if self.above == 0 else f"must be larger than {self.above:_}"
            return "must not be negative" if self.at_least == 0 else f"must be at least {self.at_least:_}"
        if self.below is not None:
            return f"must be less than {self.below:_}"
        return f"must be at most {self.at_most:_}"

    def _is_high_enough(self, value: float) -> bool:
        return value > self.above if self.above is not None else value >= self.at_least  # type: ignore[operator]

    def _is_low_enough(self, value: float) -> bool:
        return value < self.below if self.below is not None else value <= self.at_most  # type: ignore[operator]


def number(default: float | None = MISSING, **ends: float) -> Any:
    """A dataclass field for a number, or for none, in ``Range(**ends)``."""
    return dataclasses.field(default=default, metadata={_RANGES: Range(**ends)})


def numbers(default: tuple[float, ...], *ranges: Range) -> Any:
    """A dataclass field for as many numbers as there are ``ranges``, each in its own."""
    assert len(default) == len(ranges)
    return dataclasses.field(default=default, metadata={_RANGES: ranges})


def range_of(field: "dataclasses.Field[Any]") -> Range | tuple[Range, ...] | None:
    """What ``number`` or ``numbers`` said of a dataclass' field; None for a field without a range."""
    return field.metadata.get(_RANGES)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first number of ``config``, or of a dataclass in it, outside of its range.

    ``prefix``: what stands before a field's name in the sentence, such as ``model.``.
    """
    for field in dataclasses.fields(config):
        key, value, ranges = prefix + field.name, getattr(config, field.name), range_of(field)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif isinstance(ranges, Range):
            _check(key, value, ranges)
        elif ranges is not None:
            _check_several(key, list(value), ranges)


def _check(key: str, value: float | None, allowed: Range) -> None:
    if value is not None:
        # an integer has no NaN, and may be too large for a float
        require(isinstance(value, int) or math.isfinite(value), f"{key}={value} must be a finite number")
        require(value in allowed, f"{key}={value} {allowed.demand(value)}")


def _check_several(key: str, values: list[Any], ranges: tuple[Range, ...]) -> None:
    parts = ", ".join(f"the {_ORDINALS[i]} in {allowed}" for i, allowed in enumerate(ranges))
    require(
        len(values) == len(ranges)
        and all(isinstance(value, int | float) for value in values)  # [[1], [2]] passes for two numbers, too
        and all(value in allowed for value, allowed in zip(values, ranges, strict=True)),
        f"{key}={values} must be {_WORDS[len(ranges)]}, {parts}",
    )
