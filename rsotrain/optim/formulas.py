"""Bytes of the optimizer state in closed form, from the shapes of a model alone.

The class of each method gives the state of a matrix (``matrix_state``), and ``optimizer.rest`` says which
method has all other parameters. The formulas check the planner, which measures the optimizer's tensors. Only
a method of the user's own may do without one.
"""

import re
from dataclasses import dataclass

from rsotrain.config.schema import Config, ModelConfig, Precision
from rsotrain.models import architecture
from rsotrain.models.architecture import Weight
from rsotrain.models.build import model_without_memory
from rsotrain.optim.build import build_sampler, method_of
from rsotrain.optim.rest import rest_state_bytes
from rsotrain.optim.state_size import WeightsLayout
from rsotrain.parallel.ranks import shards_of


def weights_of(model: ModelConfig, vocab_size: int) -> list[Weight]:
    """All parameters of a model that are not frozen; a tied one once."""
    built = model_without_memory(model, vocab_size)
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    return [weight for weight in architecture.weights_of(built) if weight.name in trained]


@dataclass(frozen=True)
class StateBytes:
    """Bytes on rank 0, which has the largest pieces. ``blocks``: for the attention and MLP weights."""

    blocks: int
    rest: int

    @property
    def total(self) -> int:
        return self.blocks + self.rest


def state_bytes(config: Config, vocab_size: int) -> StateBytes | None:
    """Bytes of the optimizer state on rank 0 of ``parallelism.world_size`` ranks; None without a formula."""
    optimizer = config.optimizer
    if not method_of(optimizer).has_formula():
        return None
    patterns = [re.compile(pattern) for pattern in optimizer.block_parameters]
    blocks: list[Weight] = []
    rest: list[Weight] = []
    for weight in weights_of(config.model, vocab_size):
        matched = any(pattern.search(weight.name) for pattern in patterns)
        (blocks if matched else rest).append(weight)
    layout = _layout(config)
    return StateBytes(
        method_of(optimizer).state_bytes_formula(optimizer, blocks, layout) if blocks else 0,
        rest_state_bytes(optimizer, rest, layout),
    )


def _layout(config: Config) -> WeightsLayout:
    pieces = shards_of(config.parallelism, config.parallelism.world_size or 1)
    sampler = build_sampler(config.sampler)
    if sampler is None:
        return WeightsLayout(pieces, config.optimizer.state_dtype)
    return WeightsLayout(
        pieces,
        config.optimizer.state_dtype,
        basis_bytes=4 if config.precision is Precision.fp32 else 2,
        bases_are_optimised=sampler.post_update,
        sampler_state=sampler.state_bytes,
    )
