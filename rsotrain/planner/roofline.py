"""How long a step should take on a GPU: what it asks for, at the rates of the data sheet.

It is a roofline operation by operation: each takes the longest of its FLOPs, its bytes and its launches, each
at a share of the promised rate. What is assumed stands in ``ASSUMPTIONS``, and is printed beside the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rsotrain.instruments.phases import Phase
from rsotrain.instruments.work import Bound, Operation, Work
from rsotrain.planner.cards import CARDS, Card

# Shares of a data sheet's rate that large operations are known to reach.
_OF_PRODUCTS, _OF_ATTENTION, _OF_DECOMPOSITIONS, _OF_BANDWIDTH, _OF_LINK = 0.7, 0.4, 0.02, 0.85, 0.7
_LAUNCH_SECONDS = 6e-6  # of the host for an operation that torch runs from Python, with autograd
_KERNEL_SECONDS = 2e-6  # the shortest
_COLLECTIVE_SECONDS = 20e-6
_GPUS_OF_NODE = 8
_NETWORK = 50e9  # bytes/s that a GPU sends to other nodes

ASSUMPTIONS = (
    f"assumed, not measured: products at {_OF_PRODUCTS:.0%} of the data sheet's rate, attention at"
    f" {_OF_ATTENTION:.0%}, decompositions at {_OF_DECOMPOSITIONS:.0%} of that of products in their dtype,"
    f" memory at {_OF_BANDWIDTH:.0%}; {_LAUNCH_SECONDS * 1e6:.0f} µs of the host a launch, a kernel"
    f" at least {_KERNEL_SECONDS * 1e6:.0f} µs; no compilation"
)
ASSUMPTIONS_OF_RANKS = (
    f"between ranks: links at {_OF_LINK:.0%}, {_GPUS_OF_NODE} GPUs a node,"
    f" {_NETWORK / 1e9:.0f} GB/s a GPU between nodes, {_COLLECTIVE_SECONDS * 1e6:.0f} µs a collective; the"
    " passes hide what they can, the update nothing"
)
PRODUCTS, MEMORY, LAUNCHES, COMMUNICATION = "products", "memory", "launches", "communication"
_PASSES = (Phase.forward.value, Phase.backward.value)


@dataclass(frozen=True)
class StepWork:
    """``quiet``: of a step without a refresh, by phase. ``refresh``: of one with, by phase; empty where there
    is none. ``period``: steps from one refresh to the next."""

    quiet: Mapping[str, Work]
    refresh: Mapping[str, Work]
    period: int


@dataclass(frozen=True)
class Speed:
    """Seconds of a step on one kind of GPU, the refresh as its average.

    ``phases``: seconds by phase; their sum is less than ``step_seconds`` where the host is too slow to keep
    the device busy. ``bounds``: seconds of the device by what they are bound by, and of the host; ``mfu``: of
    the data sheet's rate of bfloat16 products.
    """

    gpu: str
    step_seconds: float
    tokens_per_second: float
    mfu: float
    phases: dict[str, float]
    bounds: dict[str, float]

    @property
    def bound_by(self) -> str:
        """What the step takes longest for; the others of the host and of links are hidden behind it."""
        device = self.bounds[PRODUCTS] + self.bounds[MEMORY]
        for name in (LAUNCHES, COMMUNICATION):
            if self.bounds[name] > device:
                return name
        return PRODUCTS if self.bounds[PRODUCTS] > self.bounds[MEMORY] else MEMORY


def speeds(work: StepWork, *, tokens: int, flops_per_token: int, world_size: int) -> list[Speed]:
    """``tokens``: of a step, of all ranks."""
    return [_speed(card, work, tokens, flops_per_token, world_size) for card in CARDS]


def _speed(card: Card, work: StepWork, tokens: int, flops_per_token: int, world_size: int) -> Speed:
    quiet, bounds = _seconds(card, work.quiet)
    step = max(sum(quiet.values()), bounds[LAUNCHES])
    phases = quiet
    if work.refresh:
        with_refresh, refresh_bounds = _seconds(card, work.refresh)
        longer = max(sum(with_refresh.values()), refresh_bounds[LAUNCHES]) - step
        average = max(0.0, longer) / work.period
        phases = {**quiet, Phase.refresh.value: average}
        step += average
    rate = tokens / step
    mfu = rate * flops_per_token / (card.bfloat16 * world_size)
    return Speed(card.name, step, rate, mfu, phases, bounds)


def _seconds(card: Card, by_phase: Mapping[str, Work]) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds by phase, seconds by what they are bound by) of a step."""
    phases: dict[str, float] = {}
    bounds = dict.fromkeys((PRODUCTS, MEMORY, LAUNCHES, COMMUNICATION), 0.0)
    for phase, work in by_phase.items():
        device = sending = 0.0
        for operation, number in work.items():
            bound, seconds = _bound(card, operation)
            if bound == COMMUNICATION:
                sending += number * seconds
            else:
                device += number * seconds
            bounds[bound] += number * seconds
            bounds[LAUNCHES] += number * operation.launches * _LAUNCH_SECONDS
        phases[phase] = max(device, sending) if phase in _PASSES else device + sending
    return phases, bounds


def _bound(card: Card, operation: Operation) -> tuple[str, float]:
    if operation.sent:
        link = card.link if operation.last_rank < _GPUS_OF_NODE else min(card.link, _NETWORK)
        return COMMUNICATION, _COLLECTIVE_SECONDS + operation.sent / (_OF_LINK * link)
    computing = operation.flops / _rate(card, operation.bound) if operation.flops else 0.0
    moving = max(operation.nbytes / (_OF_BANDWIDTH * card.bandwidth), operation.launches * _KERNEL_SECONDS)
    return (PRODUCTS, computing) if computing > moving else (MEMORY, moving)


def _rate(card: Card, bound: Bound) -> float:
    """FLOP/s."""
    return {
        Bound.bfloat16: _OF_PRODUCTS * card.bfloat16,
        Bound.float32: _OF_PRODUCTS * card.float32,
        Bound.float64: _OF_PRODUCTS * card.float64,
        Bound.attention: _OF_ATTENTION * card.bfloat16,
        Bound.decomposition: _OF_DECOMPOSITIONS * card.float32,
        Bound.decomposition64: _OF_DECOMPOSITIONS * card.float64,
    }[bound]
