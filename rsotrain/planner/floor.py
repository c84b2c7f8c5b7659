"""The least memory that a configuration can take, beside its planned peak."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rsotrain.config.methods import RSOConfig
from rsotrain.config.samplers import CoordinateConfig, GaussianConfig, HaarConfig, SamplerConfig, SRHTConfig
from rsotrain.config.schema import Config
from rsotrain.instruments.phases import Phase
from rsotrain.models.build import COMPUTE_DTYPE
from rsotrain.planner.tracker import Kind


@dataclass(frozen=True)
class Floor:
    """``kinds``: bytes by kind at the moment of most memory, if no step needed a byte of working memory.

    At the end of the forward pass these are weights, optimizer state, what autograd keeps, and under FSDP one
    gathered block; before the update, weights, optimizer state and gradients, which is within the backward
    pass where updates are. ``excess``: the kind of bytes of which the planned peak has most beyond the least
    of its own moment, and how much. ``grams_at_once``: are the matrices XᵀX of all inputs among these bytes?
    """

    total: int
    kinds: dict[str, int]
    excess: tuple[str, int]
    grams_at_once: bool = False


def is_random(sampler: SamplerConfig) -> bool:
    """Do its bases depend on no data?"""
    return isinstance(sampler, HaarConfig | GaussianConfig | CoordinateConfig | SRHTConfig)


def holds_grams_at_once(config: Config) -> bool:
    """Are the matrices XᵀX of all inputs held together, which need not be?

    Those of RSO are, where its bases depend on data. Where each step draws all, none can wait.
    """
    optimizer = config.optimizer
    if not isinstance(optimizer, RSOConfig) or is_random(config.sampler):
        return False
    return not optimizer.staggered and optimizer.update_proj_gap > 1


def floor_of(
    *,
    parameters: int,
    gradients: int,
    optimizer_state: int,
    saved_activations: int,
    gathered_block: int,
    phases: Mapping[str, Mapping[str, int]],
    in_backward: bool = False,
    grams_at_once: bool = False,
) -> Floor:
    always = {Kind.parameters.value: parameters, Kind.optimizer_state.value: optimizer_state}
    passes = always | {Kind.activations.value: saved_activations, Kind.gathered.value: gathered_block}
    update = always | {Kind.gradients.value: gradients}
    kinds = max(passes, update, key=lambda kinds: sum(kinds.values()))
    worst = max(phases, key=lambda phase: phases[phase]["peak"])
    least = passes if worst in (Phase.forward.value, Phase.backward.value) else update  # at that moment
    if in_backward:
        least = passes | update
    excess = {kind.value: phases[worst][kind.value] - least.get(kind.value, 0) for kind in Kind}
    name = max(excess, key=excess.__getitem__)
    return Floor(sum(kinds.values()), kinds, (name, excess[name]), grams_at_once)


def gathered_block_bytes(config: Config, model: nn.Module) -> int:
    """Bytes of the largest block's weights in the compute dtype."""
    itemsize = COMPUTE_DTYPE[config.precision].itemsize
    blocks = model.get_submodule("model.layers").children()
    return max(itemsize * sum(p.numel() for p in block.parameters()) for block in blocks)
