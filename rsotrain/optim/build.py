"""Builds optimizers and samplers from their settings, with which ``config`` registers the code of each."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rsotrain.config.methods import OptimizerConfig, SubspaceConfig
from rsotrain.config.ranges import check_ranges
from rsotrain.config.samplers import OnlinePCAConfig, SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.errors import require
from rsotrain.optim.base import ParamGroupOptimizer, Settings
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.moments import StateKeeper
from rsotrain.optim.parameter_groups import group_parameters, is_norm_or_embedding
from rsotrain.optim.registered import code_of, method_of
from rsotrain.optim.rest import refuse_rest, rest_optimizers, sharded_by_rows
from rsotrain.optim.with_bases import Subspace
from rsotrain.subspace.samplers import Sampler


def build_sampler(config: SamplerConfig) -> Sampler | None:
    """The sampler; None for sampler=none. Raises UserError for a setting out of range."""
    check_ranges(config, "sampler.")
    build = code_of(type(config))
    return None if build is None else build(config)


def build_optimizer(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    sampler: SamplerConfig,
    *,
    precision: Precision = Precision.fp32,
    seed: int,
    total_steps: int,
    place: Callable[[nn.Module, Iterable[nn.Parameter]], None] | None = None,
) -> CompositeOptimizer:
    """The method of ``config`` for the attention and MLP weights, ``config.rest`` for all other parameters.

    ``model``: a module, or pairs of name and parameter. RSO needs a module, whose linears it replaces.
    ``precision``: unless it is fp32, projections run in bfloat16. ``seed``, ``total_steps``: those of the
    run. ``place(model, by_rows)``: called to shard the model and give it memory, after the method has changed
    the modules and before optimizer state is created; ``by_rows``: parameters to shard in their rows.
    Raises UserError if the patterns do not fit the model, if the rank does not fit a matrix, or if optimizer
    and sampler do not go together.
    """
    method = method_of(config)
    check_ranges(config, "optimizer.")
    require(
        config.betas[1] < 1.0 or method.takes_adagrad_beta,
        f"optimizer.betas: a second beta of 1 (AdaGrad) is for sn, sm and sn_sm, not for {config.name}",
    )
    groups = group_parameters(model, config.block_parameters)
    refuse_rest(config, (tuple(p.shape) for p in groups.rest.values()))
    own: dict[str, Any] = {}
    if groups.blocks:
        if isinstance(sampler, OnlinePCAConfig) and sampler.weight_decay is None:
            sampler = replace(sampler, weight_decay=config.weight_decay)
        built = build_sampler(sampler)
        method.refuse(config, built)
        if built is not None:
            own["subspace"] = _subspace(config, built, precision, seed, total_steps)
        groups, more = method.prepare_model(model, groups, config)
        own |= more
    if place is not None:
        assert isinstance(model, nn.Module)
        by_rows = sharded_by_rows(config, groups.rest.values())
        place(model, [*by_rows, *(groups.blocks.values() if method.by_rows else ())])
        groups = groups.renewed(model)
    require(
        config.scale > 0 or not config.decay_at_lr,
        "optimizer.decay_at_lr is for optimizer.scale > 0; with scale 0 these weights do not move",
    )
    settings = Settings(
        keeper=StateKeeper(getattr(torch, config.state_dtype.value), seed),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_rounding=config.weight_rounding,
    )
    optimizers: list[ParamGroupOptimizer] = []
    if groups.blocks:
        decay = config.weight_decay / config.scale if config.decay_at_lr else config.weight_decay
        # a method may have embedding and head among its matrices, as SCALE does
        spared = () if config.decay_norms_and_embeddings else groups.blocks.items()
        undecayed_blocks = frozenset(name for name, p in spared if is_norm_or_embedding(name, p))
        own_settings = replace(settings, weight_decay=decay, undecayed=undecayed_blocks)
        optimizers.append(
            method(config.name, groups.blocks, config.lr * config.scale, own_settings, config, **own)
        )
    optimizers += rest_optimizers(config, groups.rest, settings)
    for optimizer in optimizers:
        optimizer.join_state()
    return CompositeOptimizer(optimizers, groups, in_backward=config.update_in_backward)


def _subspace(
    config: OptimizerConfig, sampler: Sampler, precision: Precision, seed: int, total_steps: int
) -> Subspace:
    assert isinstance(config, SubspaceConfig), f"{type(config).__name__} has a sampler, but no rank"
    return Subspace(
        sampler=sampler,
        rank=config.rank,
        gap=config.update_proj_gap,
        on_refresh=config.on_refresh,
        staggered=config.staggered,
        seed=seed,
        total_steps=total_steps,
        compute_dtype=None if precision is Precision.fp32 else torch.bfloat16,
    )
