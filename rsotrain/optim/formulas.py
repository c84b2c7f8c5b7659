"""Bytes of the optimizer state in closed form, from the shapes of a model alone.

The class of each method gives the state of a matrix (``matrix_state``), and ``optimizer.rest`` says which
method has all other parameters. The formulas check the planner, which measures the optimizer's tensors. Only
a method of the user's own may do without one.
"""

from dataclasses import dataclass

from rsotrain.config.groups import all_methods, first_match, method_groups
from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.samplers import SamplerConfig
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
    optimizer, methods = config.optimizer, list(all_methods(config.optimizer, config.sampler))
    if not all(method_of(own).has_formula() for own, _ in methods):
        return None
    patterns = [group.pattern for group in method_groups(optimizer)]
    weights: list[list[Weight]] = [[] for _ in methods]
    rest: list[Weight] = []
    for weight in weights_of(config.model, vocab_size):
        group = first_match(weight.name, patterns)
        if group is not None:
            weights[1 + group].append(weight)
        elif first_match(weight.name, optimizer.block_parameters) is not None:
            weights[0].append(weight)
        else:
            rest.append(weight)
    blocks = sum(
        method_of(own).state_bytes_formula(own, matrices, _layout(config, own, sampler))
        for (own, sampler), matrices in zip(methods, weights, strict=True)
        if matrices
    )
    return StateBytes(blocks, rest_state_bytes(optimizer, rest, _layout(config, optimizer, config.sampler)))


def _layout(config: Config, optimizer: OptimizerConfig, sampler: SamplerConfig) -> WeightsLayout:
    """How a run of ``config`` stores what a method and its sampler keep."""
    pieces = shards_of(config.parallelism, config.parallelism.world_size or 1)
    built = build_sampler(sampler)
    if built is None:
        return WeightsLayout(pieces, optimizer.state_dtype)
    return WeightsLayout(
        pieces,
        optimizer.state_dtype,
        basis_bytes=4 if config.precision is Precision.fp32 else 2,
        bases_are_optimised=built.post_update,
        numbered=built.numbered,
        sampler_state=built.state_bytes,
    )
