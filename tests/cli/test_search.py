"""Which values a search tries, on invented losses: no run is started."""

import math
from collections.abc import Callable

import pytest

from rsotrain.cli.search import Best, Ladder, best_of, following
from rsotrain.config.ranges import Range


def searched(loss: Callable[[float], float], ladder: Ladder, most: int = 100) -> dict[int, float]:
    """The losses of all rungs that a search visits, one run after the other."""
    losses: dict[int, float] = {}
    while len(losses) < most and (due := following(losses, ladder)):
        value = ladder.value(due[0])
        assert value is not None
        assert due[0] not in losses
        losses[due[0]] = loss(value)
    return losses


def valley(best: float) -> Callable[[float], float]:
    return lambda value: abs(math.log(value / best))


@pytest.mark.parametrize("best", [0.001, 0.04, 0.1, 0.3, 50])
def test_the_best_ends_between_two_that_are_worse(best: float) -> None:
    ladder = Ladder(0.1, 2.0)
    losses = searched(valley(best), ladder)
    found = best_of(losses)
    assert found is not None
    assert found.inside
    assert losses[found.rung - 1] > found.loss < losses[found.rung + 1]
    assert abs(math.log2((ladder.value(found.rung) or 0) / best)) <= 0.5  # no other rung is nearer
    # nothing is tried beyond the first worse ones, whichever way the search went
    lowest, highest = min(losses), max(losses)
    assert set(losses) == set(range(lowest, highest + 1))
    assert (lowest, highest) == (min(-1, found.rung - 1), max(0, found.rung + 1))


def test_what_can_run_at_once_is_due_at_once_and_never_in_vain() -> None:
    ladder = Ladder(0.1, 2.0)
    assert following({}, ladder) == [0, -1, 1]
    assert following({0: 1.0}, ladder) == [-1, 1]
    assert following({-1: 2.0, 0: 1.0, 1: 0.5}, ladder) == [2]
    assert following({0: 1.0, 1: 0.5}, ladder) == [2]  # 0 is worse already, so -1 is not needed
    assert following({-1: 2.0, 0: 1.0, 1: 1.5}, ladder) == []


def test_a_value_that_diverges_is_worse_than_any() -> None:
    ladder = Ladder(0.1, 2.0)
    losses = searched(lambda value: math.inf if value > 0.15 else 3.0 - value, ladder)
    assert losses == {0: 2.9, -1: 2.95, 1: math.inf}
    assert best_of(losses) == Best(0, 2.9, inside=True)
    # a start that diverges is left downwards, and nothing above it is tried
    losses = searched(lambda value: math.inf if value > 0.03 else valley(0.01)(value), ladder)
    assert max(losses) == 0
    assert best_of(losses) == Best(-3, pytest.approx(math.log(1.25)), inside=True)
    assert best_of({0: math.inf}) is None
    assert best_of({}) is None


def test_where_all_diverge_the_search_goes_down_to_the_end_then_up() -> None:
    ladder = Ladder(1.0, 10.0, lowest=0.1, highest=10.0)
    assert searched(lambda _: math.inf, ladder) == {0: math.inf, -1: math.inf, 1: math.inf}
    assert len(searched(lambda _: math.inf, Ladder(1.0, 10.0), most=5)) == 5


@pytest.mark.parametrize(("best", "end"), [(0.001, -2), (70.0, 1)])
def test_the_best_at_an_end_of_what_is_allowed_is_not_inside(best: float, end: int) -> None:
    losses = searched(valley(best), Ladder(0.4, 2.0, lowest=0.1, highest=0.8))
    found = best_of(losses)
    assert found is not None
    assert (found.rung, found.inside) == (end, False)


def test_of_equal_losses_the_lower_value_is_taken() -> None:
    assert best_of({0: 1.0, 1: 1.0, 2: 2.0, -1: 3.0}) == Best(0, 1.0, inside=True)


def test_values_stay_in_the_range_of_the_key_and_are_round_numbers() -> None:
    ladder = Ladder(0.3, 2.0, Range(above=0, at_most=1))
    assert [ladder.value(rung) for rung in (-1, 0, 1, 2)] == [0.15, 0.3, 0.6, None]
    assert Ladder(0.1, 3.0).value(1) == 0.3  # 0.1 * 3 is 0.30000000000000004


def test_whole_numbers_are_rounded_and_none_comes_twice() -> None:
    ladder = Ladder(4, 2.0, Range(at_least=0, at_most=100), whole=True)
    assert [ladder.value(rung) for rung in range(-4, 6)] == [None, 0, 1, 2, 4, 8, 16, 32, 64, None]
    narrow = Ladder(2, 1.2, whole=True)
    assert (narrow.value(1), narrow.value(-1)) == (None, None)
    assert isinstance(ladder.value(1), int)
