"""Schedules: the values at the corners, and the shapes in between."""

import itertools

import pytest
import torch

from rsotrain.config.schedules import (
    SCHEDULES,
    ConstantConfig,
    CosineConfig,
    EndOfDecay,
    LinearConfig,
    LRSchedulerConfig,
    WSDConfig,
)
from rsotrain.training.lr_scheduler import lr_factor

ALL = list(SCHEDULES.values())


def factors(config: LRSchedulerConfig, total: int) -> list[float]:
    return [lr_factor(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ALL)
def test_warm_up_is_linear_and_the_rest_never_rises(schedule: type[LRSchedulerConfig]) -> None:
    values = factors(schedule(warmup_fraction=0.1), 100)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert all(0 <= v <= 1 for v in values)


WITHOUT_WARMUP = {"warmup_steps": 0, "warmup_fraction": 0.0}
AS_AT_FIRST = {"end": EndOfDecay.at_last_update, **WITHOUT_WARMUP}


@pytest.mark.parametrize(
    ("config", "last"),
    [
        (CosineConfig(min_ratio=0.1, **WITHOUT_WARMUP), 0.1),
        (LinearConfig(min_ratio=0.2, **AS_AT_FIRST), 0.2),
        (WSDConfig(min_ratio=0.0, **AS_AT_FIRST), 0.0),
        (WSDConfig(min_ratio=0.3, **AS_AT_FIRST), 0.3),
        (ConstantConfig(**WITHOUT_WARMUP), 1.0),
    ],
)
@pytest.mark.parametrize("total", [2, 7, 100])
def test_the_last_update_has_the_minimum(config: LRSchedulerConfig, last: float, total: int) -> None:
    if isinstance(config, WSDConfig) and round(config.decay_fraction * total) == 0:
        last = 1.0  # too short to decay
    assert lr_factor(config, total - 1, total) == pytest.approx(last)


@pytest.mark.parametrize("minimum", [0.0, 0.3])
@pytest.mark.parametrize("warmup", [0, 3, 9])
@pytest.mark.parametrize("total", [10, 100])
def test_a_straight_line_reaches_its_end_after_the_last_update(
    minimum: float, warmup: int, total: int
) -> None:
    linear = LinearConfig(min_ratio=minimum, warmup_steps=warmup)
    wsd = WSDConfig(min_ratio=minimum, warmup_steps=warmup, decay_fraction=0.1)
    for config, begin in ((linear, warmup), (wsd, total - total // 10)):
        values = factors(config, total)
        expected = [1 - (1 - minimum) * i / (total - begin) for i in range(total - begin + 1)]
        assert values[begin:] == pytest.approx(expected[:-1])
        assert expected[-1] == pytest.approx(minimum)
        assert values[-1] > minimum  # it trains


def test_a_straight_line_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 0, 20)
    found = []
    for _ in range(20):
        found.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert factors(LinearConfig(warmup_steps=0), 20) == pytest.approx(found)


def test_cosine_is_half_way_at_half_time_and_wsd_is_flat_until_it_decays() -> None:
    cosine = CosineConfig(min_ratio=0.1, warmup_steps=0)
    assert lr_factor(cosine, 49, 100) == pytest.approx((1 + 0.1) / 2)
    values = factors(WSDConfig(warmup_steps=10, decay_fraction=0.2), 100)
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([(20 - i) / 20 for i in range(20)])
    values = factors(WSDConfig(warmup_steps=10, decay_fraction=0.2, end=EndOfDecay.at_last_update), 100)
    assert values[80:] == pytest.approx([(19 - i) / 20 for i in range(20)])


def test_warmup_steps_win_over_the_fraction_and_may_be_all() -> None:
    assert factors(CosineConfig(warmup_fraction=0.5, warmup_steps=2), 4)[:2] == [0.5, 1.0]
    assert factors(LinearConfig(warmup_steps=4), 4) == [0.25, 0.5, 0.75, 1.0]
    assert factors(CosineConfig(), 1) == [pytest.approx(0.1)]
