"""Builds optimizers and samplers from their settings, with which ``config`` registers the code of each."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
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


@dataclass(frozen=True)
class Division:
    """Parameters, by name, that have some settings of their own: one of the groups that torch's optimizers
    take. ``settings``: fields of ``OptimizerConfig``."""

    names: Set[str]
    settings: Mapping[str, Any]


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
    divisions: Sequence[Division] = (),
) -> CompositeOptimizer:
    """The method of ``config`` for the attention and MLP weights, those of ``config.groups`` for the matrices
    that these find, ``config.rest`` for all other parameters.

    ``model``: a module, or pairs of name and parameter. RSO needs a module, whose linears it replaces.
    ``precision``: unless it is fp32, projections run in bfloat16. ``seed``, ``total_steps``: those of the
    run. ``place(model, by_rows)``: called to shard the model and give it memory, after the method has changed
    the modules and before optimizer state is created; ``by_rows``: parameters to shard in their rows.
    ``divisions``: of all parameters together; without any all have the settings of ``config``. Raises
    UserError if the patterns do not fit the model, if the rank does not fit a matrix, or if optimizer
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
        _refuse_parted(parts[0], groups.blocks, divisions)
        before = groups.blocks.keys()
        groups, more = parts[0].method.prepare_model(model, groups, config)
        divisions = _renamed(divisions, before, groups.blocks.keys())
        parts[0].own |= more
    if place is not None:
        assert isinstance(model, nn.Module)
        by_rows = sharded_by_rows(config, groups.rest.values())
        for part, matrices in zip(parts, (groups.blocks, *groups.claimed), strict=True):
            by_rows += matrices.values() if part.method.by_rows else ()
        place(model, by_rows)
        groups = groups.renewed(model)
    optimizers: list[ParamGroupOptimizer] = [
        part.built(own, seed, division)
        for part, matrices in zip(parts, (groups.blocks, *groups.claimed), strict=True)
        for division, own in _divided(matrices, divisions)
    ]
    for division, own in _divided(groups.rest, divisions):
        changed = replace(config, **division.settings)
        optimizers += rest_optimizers(changed, own, _settings(changed, seed, changed.weight_decay))
    for optimizer in optimizers:
        optimizer.join_state()
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

    def built(self, matrices: dict[str, nn.Parameter], seed: int, division: Division) -> ParamGroupOptimizer:
        config = replace(self.config, **division.settings)
        # a method may have embedding and head among its matrices, as SCALE does
        spared = () if config.decay_norms_and_embeddings else matrices.items()
        decay = config.weight_decay / config.scale if config.decay_at_lr else config.weight_decay
        undecayed = frozenset(name for name, p in spared if is_norm_or_embedding(name, p))
        settings = replace(_settings(config, seed, decay), undecayed=undecayed)
        return self.method(self.label, matrices, config.lr * config.scale, settings, config, **self.own)


def _settings(config: OptimizerConfig, seed: int, weight_decay: float) -> Settings:
    return Settings(
        keeper=StateKeeper(getattr(torch, config.state_dtype.value), seed),
        betas=config.betas,
        eps=config.eps,
        weight_decay=weight_decay,
        weight_rounding=config.weight_rounding,
    )


def _divided(
    parameters: dict[str, nn.Parameter], divisions: Sequence[Division]
) -> list[tuple[Division, dict[str, nn.Parameter]]]:
    """The parameters of each division; no empty ones."""
    found = [
        (division, {name: p for name, p in parameters.items() if name in division.names})
        for division in divisions or [Division(parameters.keys(), {})]
    ]
    return [(division, own) for division, own in found if own]


def _refuse_parted(part: _Part, matrices: Collection[str], divisions: Sequence[Division]) -> None:
    """Raise UserError where ``divisions`` part the matrices of a method that changes modules."""
    parted = [division for division in divisions if not division.names.isdisjoint(matrices)]
    require(
        len(parted) < 2 or not part.method.changes_modules(),
        f"{part.config.name} has one basis for linears that read the same input, or adapters, so all matrices"
        " that block_parameters finds must be in one group of params",
    )


def _renamed(divisions: Sequence[Division], before: Set[str], now: Set[str]) -> Sequence[Division]:
    """``divisions`` with those of the parameters ``now`` that take the place of matrices of ``before``."""
    return [replace(d, names=d.names | (now - before)) if d.names & before else d for d in divisions]


def refuse_idle(config: OptimizerConfig, groups: ParameterGroups) -> None:
    """Raise UserError where ``optimizer.groups`` leave the run's own method nothing but the rest."""
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
