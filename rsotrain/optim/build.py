"""Configuration -> optimizer: the only place where names of methods and samplers meet classes."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rsotrain.config.methods import (
    AdamConfig,
    ApolloConfig,
    BasisStorage,
    CoordinateConfig,
    FiraConfig,
    FrugalConfig,
    GaLoreConfig,
    GaussianConfig,
    GoLoreConfig,
    HaarConfig,
    ImportanceConfig,
    InnerSolver,
    LDAdamConfig,
    MixtureConfig,
    MuonConfig,
    NoSamplerConfig,
    OnlinePCAConfig,
    OnRefresh,
    OptimizerConfig,
    PCASolver,
    RandomizedSvdConfig,
    RSOConfig,
    SamplerConfig,
    SNConfig,
    SNSMConfig,
    SRHTConfig,
    StateDtype,
    SubspaceConfig,
    SvdConfig,
    SvdSolver,
    TopkNormConfig,
)
from rsotrain.config.schema import Precision
from rsotrain.errors import UserError, require
from rsotrain.models.subspace_linear import Site, attach_subspace
from rsotrain.optim import inner_solvers
from rsotrain.optim.adamw import AdamW
from rsotrain.optim.base import Part, Settings, StateKeeper
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.galore import GaLore
from rsotrain.optim.muon import Muon
from rsotrain.optim.param_groups import claim_parameters
from rsotrain.optim.residuals import Apollo, Fira, Frugal, LDAdam
from rsotrain.optim.rso import RSO
from rsotrain.optim.sn_sm import SubsetNorm, SubspaceMomentum
from rsotrain.optim.subspace_part import Subspace, SubspacePart
from rsotrain.subspace import online_pca, samplers
from rsotrain.subspace.samplers import Sampler

_FULL: dict[type[OptimizerConfig], type[Part]] = {
    AdamConfig: AdamW,
    SNConfig: SubsetNorm,
    MuonConfig: Muon,
}
_LOW_RANK: dict[type[OptimizerConfig], type[SubspacePart]] = {
    GaLoreConfig: GaLore,
    SNSMConfig: SubspaceMomentum,
    FiraConfig: Fira,
    FrugalConfig: Frugal,
    ApolloConfig: Apollo,
    LDAdamConfig: LDAdam,
}

_INNER_SOLVERS = {
    InnerSolver.adam: inner_solvers.ADAM,
    InnerSolver.momentum: inner_solvers.MOMENTUM,
    InnerSolver.adagrad: inner_solvers.ADAGRAD,
}


def build_sampler(config: SamplerConfig) -> Sampler:
    """Raises UserError for a setting out of range, and for NoSamplerConfig."""
    name = config.name
    match config:
        case SvdConfig():
            draw = samplers.full_svd if config.solver is SvdSolver.full else samplers.svd
            return Sampler(name, draw, informed=True)
        case ImportanceConfig():
            require(config.power > 0, f"sampler.power={config.power} must be positive")
            return Sampler(name, partial(samplers.importance, power=config.power), informed=True)
        case RandomizedSvdConfig():
            require(config.rounds >= 1, f"sampler.rounds={config.rounds} must be at least 1")
            draw = partial(samplers.randomized_svd, rounds=config.rounds)
            return Sampler(name, draw, informed=True, by_products=True)
        case TopkNormConfig():
            return Sampler(name, samplers.topk_norm, axes=True, informed=True, by_products=True)
        case MixtureConfig():
            fraction = config.principal_fraction
            require(0 <= fraction <= 1, f"sampler.principal_fraction={fraction} must lie in [0, 1]")
            return Sampler(name, partial(samplers.mixture, principal_fraction=fraction), informed=True)
        case HaarConfig():
            return Sampler(name, samplers.haar)
        case CoordinateConfig():
            return Sampler(name, samplers.coordinate, axes=True)
        case SRHTConfig():
            return Sampler(name, samplers.srht)
        case GaussianConfig():
            hint = "use sampler=haar, which is its orthonormal form"
            return Sampler(name, samplers.gaussian, orthonormal=False, unit_columns=False, hint=hint)
        case OnlinePCAConfig():
            return _online_pca(config)
        case GoLoreConfig():
            fraction = config.random_fraction
            require(0 <= fraction <= 1, f"sampler.random_fraction={fraction} must lie in [0, 1]")
            return Sampler(name, samplers.golore, informed=True, switch=1.0 - fraction)
    raise UserError(f"sampler={name} draws no basis")


def _online_pca(config: OnlinePCAConfig) -> Sampler:
    for key in ("lr", "penalty"):
        value = getattr(config, key)
        require(value >= 0, f"sampler.{key}={value} must not be negative")
    use_adam = config.solver is PCASolver.adam
    return Sampler(
        config.name,
        partial(
            online_pca.online_pca,
            lr=config.lr,
            penalty=config.penalty,
            use_adam=use_adam,
            orthonormalize=config.orthonormalize,
        ),
        orthonormal=config.orthonormalize,
        informed=True,
        lagged=True,
        by_products=True,
        hint="set sampler.orthonormalize=true",
        state_shapes=online_pca.adam_state if use_adam else samplers.no_state,
    )


def _refuse_pairs(config: SubspaceConfig, sampler: Sampler, needs_orthonormal: bool) -> None:
    pair = f"optimizer={config.name} with sampler={sampler.name}"
    transports = config.on_refresh is OnRefresh.transport
    needs = needs_orthonormal or transports
    what = "optimizer.on_refresh=transport" if not needs_orthonormal else f"optimizer={config.name}"
    otherwise = "" if needs_orthonormal else ", or set optimizer.on_refresh=keep"
    require(
        sampler.orthonormal or not needs,
        f"{pair}: {what} needs orthonormal bases, which this sampler's are not; {sampler.hint}{otherwise}",
    )
    if isinstance(config, LDAdamConfig):
        require(
            transports,
            f"optimizer={config.name} is defined by transported moments; set optimizer.on_refresh=transport",
        )
        require(
            not sampler.lagged,
            f"{pair}: error feedback needs the new basis before the update, and this sampler's comes after;"
            " use another sampler, such as randomized_svd",
        )


def _refuse_rso(config: RSOConfig, sampler: SamplerConfig, built: Sampler) -> None:
    pair = f"optimizer={config.name} with sampler={built.name}"
    scaled = isinstance(sampler, GaussianConfig)
    require(
        built.orthonormal or scaled,
        f"{pair}: RSO needs bases of a known scale, which this sampler's are not; {built.hint}",
    )
    require(
        config.basis_scale or not scaled,
        f"{pair}: these bases are scaled already, so optimizer.basis_scale=false would do nothing;"
        " leave it true or use sampler=haar",
    )
    require(
        not (isinstance(sampler, SvdConfig) and sampler.solver is SvdSolver.full),
        f"{pair}: sampler.solver=full decomposes the gradient, which RSO never forms;"
        " use sampler.solver=gram",
    )
    require(
        config.projection is BasisStorage.stored or not built.informed,
        f"{pair}: these bases depend on data, which cannot be regenerated from a seed;"
        " use optimizer.projection=stored, or a random sampler such as haar",
    )
    eta, warmup = config.proximal_eta, config.refresh_warmup_steps
    require(eta is None or eta > 0, f"optimizer.proximal_eta={eta} must be positive, or null for no term")
    require(
        0 <= warmup < config.update_proj_gap,
        f"optimizer.refresh_warmup_steps={warmup} must be at least 0 and less than"
        f" optimizer.update_proj_gap={config.update_proj_gap}",
    )


def _build_rso(
    config: RSOConfig,
    parameters: dict[str, nn.Parameter],
    settings: Settings,
    subspace: Subspace,
    sites: list[Site],
) -> RSO:
    return RSO(
        config.name,
        parameters,
        config.lr * config.scale,
        settings,
        subspace,
        sites=sites,
        solver=_INNER_SOLVERS[config.solver],
        basis_scale=config.basis_scale,
        proximal_eta=config.proximal_eta,
        refresh_warmup_steps=config.refresh_warmup_steps,
        stored=config.projection is BasisStorage.stored,
    )


def _choose_subspace(
    config: OptimizerConfig, sampler: SamplerConfig, settings: dict[str, Any]
) -> Subspace | None:
    """How the bases are chosen; None for a method without any. Refuses what makes no sense."""
    if type(config) in _FULL:
        require(
            isinstance(sampler, NoSamplerConfig),
            f"optimizer={config.name} has no subspace, so sampler={sampler.name} would do nothing;"
            " leave it out",
        )
        return None
    assert isinstance(config, SubspaceConfig), f"{type(config).__name__} is not in the tables of this file"
    require(
        not isinstance(sampler, NoSamplerConfig),
        f"optimizer={config.name} needs a sampler; sampler=none is for optimizers without a subspace",
    )
    require(
        config.update_proj_gap >= 1,
        f"optimizer.update_proj_gap={config.update_proj_gap} must be at least 1",
    )
    built = build_sampler(sampler)
    if isinstance(config, RSOConfig):
        _refuse_rso(config, sampler, built)
        needs_orthonormal = False
    else:
        needs_orthonormal = _LOW_RANK[type(config)].needs_orthonormal
    _refuse_pairs(config, built, needs_orthonormal)
    return Subspace(
        sampler=built,
        rank=config.rank,
        gap=config.update_proj_gap,
        on_refresh=config.on_refresh,
        staggered=config.staggered,
        **settings,
    )


def _build_blocks(
    config: OptimizerConfig,
    parameters: dict[str, nn.Parameter],
    settings: Settings,
    subspace: Subspace | None,
    sites: list[Site],
) -> Part:
    peak_lr = config.lr * config.scale
    if isinstance(config, RSOConfig):
        assert subspace is not None
        return _build_rso(config, parameters, settings, subspace, sites)
    if subspace is None:
        full = _FULL[type(config)]
        return full(config.name, parameters, peak_lr, settings, **_own_settings(full, config))
    low_rank = _LOW_RANK[type(config)]
    own = _own_settings(low_rank, config)
    return low_rank(config.name, parameters, peak_lr, settings, subspace, **own)


def _own_settings(method: type[Part], config: OptimizerConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in method.own_settings}


def build_optimizer(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    sampler: SamplerConfig,
    *,
    precision: Precision = Precision.fp32,
    seed: int,
    total_steps: int,
    place: Callable[[nn.Module], None] | None = None,
) -> CompositeOptimizer:
    """The method of ``config`` for the block linears, AdamW for the rest.

    ``model``: a module, or pairs of name and parameter; for RSO a module, whose block linears are
    replaced. ``precision``: unless fp32, projections run in bfloat16. ``seed``: the run's;
    ``total_steps``: of the run. ``place``: shards the model and gives it memory, once the method has changed
    its modules and before there is any state. Raises UserError if the patterns do not fit the model, the rank
    does not fit a matrix, or the pair of optimizer and sampler makes no sense.
    """
    require(len(config.betas) == 2, f"optimizer.betas={list(config.betas)} must be two numbers")
    require(
        config.betas[1] < 1.0 or isinstance(config, SNConfig | SNSMConfig),
        f"optimizer.betas: a second beta of 1 (AdaGrad) is for sn, sm and sn_sm, not for {config.name}",
    )
    claims = claim_parameters(model, config.block_parameters)
    reduced = config.state_dtype is StateDtype.bfloat16
    settings = Settings(
        keeper=StateKeeper(torch.bfloat16 if reduced else torch.float32, seed),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    compute_dtype = None if precision is Precision.fp32 else torch.bfloat16
    subspace = {"seed": seed, "total_steps": total_steps, "compute_dtype": compute_dtype}
    chosen = _choose_subspace(config, sampler, subspace) if claims.blocks else None
    sites = []
    if isinstance(config, RSOConfig) and claims.blocks:
        assert isinstance(model, nn.Module), "RSO replaces modules, so it needs the model itself"
        sites = attach_subspace(model, list(claims.blocks), config.rank)
    if place is not None:
        assert isinstance(model, nn.Module)
        place(model)
        claims = claims.renewed(model)
    parts = []
    if claims.blocks:
        parts.append(_build_blocks(config, claims.blocks, settings, chosen, sites))
    if claims.rest:
        if settings.betas[1] == 1.0:  # AdaGrad in the blocks; the rest is Adam all the same
            settings = replace(settings, betas=(settings.betas[0], 0.999))
        parts.append(AdamW("rest: adam", claims.rest, config.lr, settings))
    return CompositeOptimizer(parts, claims)
