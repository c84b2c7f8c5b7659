"""Builds optimizers and samplers from their settings, with which ``config`` registers the code of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from rsotrain.config.groups import method_groups
from rsotrain.config.methods import AdamConfig, OptimizerConfig, SubspaceConfig
from rsotrain.config.ranges import check_ranges
from rsotrain.config.samplers import OnlinePCAConfig, SamplerConfig
from rsotrain.config.schema import Precision
from rsotrain.errors import UserError, require
from rsotrain.optim.base import ParamGroupOptimizer, Settings
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.moments import StateKeeper
from rsotrain.optim.parameter_groups import ParameterGroups, group_parameters, is_norm_or_embedding
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
    """The method of ``config`` for the attention and MLP weights, those of ``config.groups`` for the matrices
    that these find, ``config.rest`` for all other parameters.

    ``model``: a module, or pairs of name and parameter. RSO needs a module, whose linears it replaces.
    ``precision``: unless it is fp32, projections run in bfloat16. ``seed``, ``total_steps``: those of the
    run. ``place(model, by_rows)``: called to shard the model and give it memory, after the method has changed
    the modules and before optimizer state is created; ``by_rows``: parameters to shard in their rows.
    Raises UserError if the patterns do not fit the model, if the rank does not fit a matrix, or if optimizer
    and sampler do not go together.
    """
    others = method_groups(config)
    parts = [_Part(config.name, config, sampler)]
    parts += [_Part(group.label, group.optimizer, group.sampler, group.key) for group in others]
    for part in parts:
        part.check()
    groups = group_parameters(model, config.block_parameters, others)
    refuse_rest(config, (tuple(p.shape) for p in groups.rest.values()))
    refuse_idle(config, groups)
    for part, matrices in zip(parts, (groups.blocks, *groups.claimed), strict=True):
        if matrices:
            part.choose_subspace(precision, seed, total_steps)
    if groups.blocks:
        groups, more = parts[0].method.prepare_model(model, groups, config)
        parts[0].own |= more
    if place is not None:
        assert isinstance(model, nn.Module)
        by_rows = sharded_by_rows(config, groups.rest.values())
        for part, matrices in zip(parts, (groups.blocks, *groups.claimed), strict=True):
            by_rows += matrices.values() if part.method.by_rows else ()
        place(model, by_rows)
        groups = groups.renewed(model)
    settings = Settings(
        keeper=StateKeeper(getattr(torch, config.state_dtype.value), seed),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_rounding=config.weight_rounding,
    )
    optimizers: list[ParamGroupOptimizer] = [
        part.built(matrices, seed)
        for part, matrices in zip(parts, (groups.blocks, *groups.claimed), strict=True)
        if matrices
    ]
    optimizers += rest_optimizers(config, groups.rest, settings)
    return CompositeOptimizer(optimizers, groups, in_backward=config.update_in_backward)


@dataclass
class _Part:
    """A method of a run: its own, or that of a group, whose ``key`` begins the sentences about it.

    ``own``: what the constructor is given beside what all methods are.
    """

    label: str
    config: OptimizerConfig
    sampler: SamplerConfig
    key: str = ""
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> type[ParamGroupOptimizer]:
        return method_of(self.config)

    def check(self) -> None:
        """Raise UserError for settings that no parameters can mend."""
        config, begin = self.config, f"{self.key}: " if self.key else ""
        check_ranges(config, f"{self.key or 'optimizer'}.")
        require(
            config.betas[1] < 1.0 or self.method.takes_adagrad_beta,
            f"{begin}optimizer.betas: a second beta of 1 (AdaGrad) is for sn, sm and sn_sm, not for"
            f" {config.name}",
        )
        require(
            config.scale > 0 or not config.decay_at_lr,
            f"{begin}optimizer.decay_at_lr is for optimizer.scale > 0; with scale 0 these weights do not"
            " move",
        )
        require(
            not self.key or not self.method.changes_modules(),
            f"{self.key}: {config.name} changes the modules of the model, which only the run's own optimizer"
            f" can; take optimizer={config.name}, and make groups of what other methods train",
        )

    def choose_subspace(self, precision: Precision, seed: int, total_steps: int) -> None:
        """Raise UserError if the sampler does not go with the method."""
        sampler = self.sampler
        if isinstance(sampler, OnlinePCAConfig) and sampler.weight_decay is None:
            sampler = replace(sampler, weight_decay=self.config.weight_decay)
        built = build_sampler(sampler)
        try:
            self.method.refuse(self.config, built)
        except UserError as error:
            raise UserError(f"{self.key}: {error}" if self.key else str(error)) from error
        if built is not None:
            self.own["subspace"] = _subspace(self.config, built, precision, seed, total_steps)

    def built(self, matrices: dict[str, nn.Parameter], seed: int) -> ParamGroupOptimizer:
        config = self.config
        # a method may have embedding and head among its matrices, as SCALE does
        spared = () if config.decay_norms_and_embeddings else matrices.items()
        settings = Settings(
            keeper=StateKeeper(getattr(torch, config.state_dtype.value), seed),
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay / config.scale if config.decay_at_lr else config.weight_decay,
            undecayed=frozenset(name for name, p in spared if is_norm_or_embedding(name, p)),
            weight_rounding=config.weight_rounding,
        )
        return self.method(self.label, matrices, config.lr * config.scale, settings, config, **self.own)


def refuse_idle(config: OptimizerConfig, groups: ParameterGroups) -> None:
    """Raise UserError where ``optimizer.groups`` leave the run's own method nothing, and another would do."""
    require(
        bool(groups.blocks) or not groups.claimed or isinstance(config, AdamConfig),
        f"optimizer.groups leave optimizer={config.name} no matrix that optimizer.block_parameters finds;"
        " take optimizer=adam, which also trains the rest, or narrow a pattern",
    )


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
