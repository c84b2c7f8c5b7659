"""The typed settings of optimizers and samplers, and which code is theirs.

The class that ``@optimizer`` or ``@sampler`` is written above is all the registration that a method needs: a
file of ``conf/`` names its schema, the builders import its code, tests and tables go through ``OPTIMIZERS``
and ``SAMPLERS``. This module imports no torch, so the code is named by its place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from omegaconf import MISSING

from rsotrain.config.later import later
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, SMALL, Range, number, numbers


class OnRefresh(Enum):
    """What happens to the moments when the basis changes."""

    keep = "keep"
    reset = "reset"
    transport = "transport"


class StateDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


Settings = TypeVar("Settings", bound=type)

# Name of the schema -> settings; settings -> ``module:name`` of the code.
OPTIMIZERS: "dict[str, type[OptimizerConfig]]" = {}
SAMPLERS: "dict[str, type[SamplerConfig]]" = {}
CODE: dict[type, str] = {}


def optimizer(schema: str, code: str) -> Callable[[Settings], Settings]:
    """Register settings under the name ``schema``; ``code``: ``module:class``, a ParamGroupOptimizer."""
    return _registering(OPTIMIZERS, schema, code)


def sampler(schema: str, code: str) -> Callable[[Settings], Settings]:
    """The same for a sampler; ``code``: ``module:function`` from the settings to a Sampler, or empty."""
    return _registering(SAMPLERS, schema, code)


def _registering(registry: dict[str, type], schema: str, code: str) -> Callable[[Settings], Settings]:
    def register(settings: Settings) -> Settings:
        assert schema not in registry, f"two schemas are called {schema} in {__name__}"
        registry[schema] = settings
        CODE[settings] = code
        return settings

    return register


# --- optimizer ---------------------------------------------------------------------------------


@dataclass
class OptimizerConfig:
    """What every optimizer has.

    ``lr`` drives the rest (embedding, head, norms); the linears that ``block_parameters`` names get
    ``lr * scale``. ``block_parameters`` are regular expressions searched for in parameter names.
    """

    name: str = MISSING
    lr: float = number(at_least=0, at_most=1000)
    scale: float = number(1.0, at_least=0, at_most=10**6)
    betas: tuple[float, float] = numbers(
        (0.9, 0.999), Range(at_least=0, below=1), Range(at_least=0, at_most=1)
    )
    eps: float = number(1e-8, at_least=SMALL, at_most=1)
    weight_decay: float = number(0.0, at_least=0, at_most=1000)
    state_dtype: StateDtype = StateDtype.float32
    block_parameters: list[str] = field(
        default_factory=lambda: [
            r"\.self_attn\.[qkvo]_proj\.weight$",
            r"\.mlp\.(gate|up|down)_proj\.weight$",
        ]
    )


@optimizer("adam", "rsotrain.optim.adamw:AdamW")
@dataclass
class AdamConfig(OptimizerConfig):
    """AdamW, torch's fused kernel."""


@dataclass
class SubspaceConfig(OptimizerConfig):
    """What every optimizer with a low-rank basis has.

    ``rank``: an integer, or a fraction (0 < rank ≤ 1.0, written with a point) of the projected
    dimension of each matrix. ``update_proj_gap``: T, optimizer steps between two refreshes.
    ``staggered``: spread the refreshes of the matrices over the T steps instead of all at once, which also
    spreads the memory of what RSO gathers for them.
    """

    rank: int | float = number(0.25, above=0, at_most=SIZE)
    update_proj_gap: int = number(200, above=0, at_most=COUNT)
    on_refresh: OnRefresh = OnRefresh.keep
    staggered: bool = False


class InnerSolver(Enum):
    """The rule for the gradient in the subspace. momentum: its bias-corrected average, betas[0]."""

    adam = "adam"
    momentum = "momentum"
    adagrad = "adagrad"


@dataclass
class SolverConfig(SubspaceConfig):
    """What every optimizer has whose rule in the subspace can be chosen: ``solver``, published with Adam."""

    solver: InnerSolver = later(InnerSolver.adam)


@optimizer("galore", "rsotrain.optim.galore:GaLore")
@dataclass
class GaLoreConfig(SolverConfig):
    """Adam in the subspace, nothing outside (GaLore, arXiv 2403.03507; I3S, OSD with their samplers)."""


@optimizer("sn", "rsotrain.optim.sn_sm:SubsetNorm")
@dataclass
class SNConfig(OptimizerConfig):
    """Full momentum, subset-norm second moment (arXiv 2411.07120). ``betas[1]`` = 1 is AdaGrad.

    ``subset_size``: entries that share one second moment, neighbours in the smaller dimension, which it
    divides; null: a whole row (or column, if there are fewer rows than columns).
    """

    subset_size: int | None = number(None, above=0, at_most=SIZE)


@optimizer("sn_sm", "rsotrain.optim.sn_sm:SubspaceMomentum")
@dataclass
class SNSMConfig(SubspaceConfig):
    """Subspace momentum, plain gradient outside; ``subset_size`` as in SNConfig (1: Adam's second moment)."""

    subset_size: int | None = number(None, above=0, at_most=SIZE)


@optimizer("fira", "rsotrain.optim.residuals:Fira")
@dataclass
class FiraConfig(SolverConfig):
    """GaLore plus the scaled residual (arXiv 2410.01623).

    ``max_growth``: the most that the residual's norm grows in one step.
    """

    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)


@optimizer("frugal", "rsotrain.optim.residuals:Frugal")
@dataclass
class FrugalConfig(SolverConfig):
    """Adam in the subspace, outside it signSGD at ``free_scale`` times that rate (arXiv 2411.07837)."""

    free_scale: float = number(1.0, at_least=0, at_most=10**6)


@optimizer("apollo", "rsotrain.optim.residuals:Apollo")
@dataclass
class ApolloConfig(SolverConfig):
    """Gradient scaled per channel, or by one factor ``per_tensor`` (arXiv 2412.05270).

    ``max_growth``: the most that the norm of the update grows in one step.
    """

    per_tensor: bool = False
    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)


@optimizer("ldadam", "rsotrain.optim.residuals:LDAdam")
@dataclass
class LDAdamConfig(SubspaceConfig):
    """A new basis every step, projection-aware moments, error feedback (arXiv 2410.16103).

    ``rho``: weight of the momentum, against the gradient, in what the basis is drawn from.
    """

    rho: float = number(0.908, at_least=0, at_most=1)


@optimizer("muon", "rsotrain.optim.muon:Muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """torch's Muon for the blocks, rates on AdamW's scale; ``betas`` and ``eps`` are the rest's."""

    momentum: float = number(0.95, at_least=0, at_most=1)
    nesterov: bool = True
    ns_steps: int = number(5, at_least=1, at_most=99)


class BasisStorage(Enum):
    """stored: bases are part of the state. regenerated: drawn again from their seed at each use."""

    stored = "stored"
    regenerated = "regenerated"


@optimizer("rso", "rsotrain.optim.rso:RSO")
@dataclass
class RSOConfig(SubspaceConfig):
    """W + B Pᵀ with P random on the input side; only B has gradients (RSO, arXiv 2502.07222).

    ``rank``: an integer, or a fraction of the largest min(in, out) of the linears that share an input, so
    that 0.25 is hidden/4 in every block. ``basis_scale``: orthonormal bases times √(in/rank), for
    E[PPᵀ] = I. ``proximal_eta``: η of the proximal term ‖B‖²/(2η); null: none. ``refresh_warmup_steps``:
    the blocks' rate rises linearly over as many steps after each refresh.
    """

    solver: InnerSolver = InnerSolver.adam
    basis_scale: bool = True
    proximal_eta: float | None = number(None, above=0, at_most=FACTOR)
    refresh_warmup_steps: int = number(0, at_least=0, at_most=COUNT)
    projection: BasisStorage = BasisStorage.stored


# --- sampler -----------------------------------------------------------------------------------


@dataclass
class SamplerConfig:
    name: str = MISSING


@sampler("none", "")
@dataclass
class NoSamplerConfig(SamplerConfig):
    """For optimizers without a subspace."""


class SvdSolver(Enum):
    """gram: eigenvectors of the smaller side's Gram matrix. full: torch.linalg.svd, signs included."""

    gram = "gram"
    full = "full"


@sampler("svd", "rsotrain.subspace.spectral:svd_sampler")
@dataclass
class SvdConfig(SamplerConfig):
    """The dominant singular vectors."""

    solver: SvdSolver = SvdSolver.gram


@sampler("importance", "rsotrain.subspace.spectral:importance_sampler")
@dataclass
class ImportanceConfig(SamplerConfig):
    """Singular vectors drawn without replacement, weights σ ** ``power`` (I3S, arXiv 2502.05790)."""

    power: float = number(1.0, above=0, at_most=100)


@sampler("randomized_svd", "rsotrain.subspace.spectral:randomized_svd_sampler")
@dataclass
class RandomizedSvdConfig(SamplerConfig):
    """Block power iteration from the basis in use: ``rounds`` of it, two more at the first draw."""

    rounds: int = number(2, at_least=1, at_most=100)


@sampler("mixture", "rsotrain.subspace.spectral:mixture_sampler")
@dataclass
class MixtureConfig(SamplerConfig):
    """The dominant singular vectors for ``principal_fraction`` of the rank, the rest haar outside them."""

    principal_fraction: float = number(0.5, at_least=0, at_most=1)


@sampler("haar", "rsotrain.subspace.random_bases:haar_sampler")
@dataclass
class HaarConfig(SamplerConfig):
    """A uniformly random orthonormal basis."""


@sampler("gaussian", "rsotrain.subspace.random_bases:gaussian_sampler")
@dataclass
class GaussianConfig(SamplerConfig):
    """Independent N(0, 1/rank) entries: not orthonormal, E[PPᵀ] = I."""


@sampler("coordinate", "rsotrain.subspace.random_bases:coordinate_sampler")
@dataclass
class CoordinateConfig(SamplerConfig):
    """Random axes."""


@sampler("topk_norm", "rsotrain.subspace.spectral:topk_norm_sampler")
@dataclass
class TopkNormConfig(SamplerConfig):
    """The axes along which the gradient is largest."""


@sampler("srht", "rsotrain.subspace.random_bases:srht_sampler")
@dataclass
class SRHTConfig(SamplerConfig):
    """Random columns of a randomly signed Hadamard (times cosine) matrix; orthonormal."""


class PCASolver(Enum):
    adam = "adam"
    sgd = "sgd"


@sampler("online_pca", "rsotrain.subspace.online_pca:online_pca_sampler")
@dataclass
class OnlinePCAConfig(SamplerConfig):
    """A step of online PCA at each refresh, after the weights' (OSD, arXiv 2408.12857).

    ``lr``: peak rate of the basis, on the run's schedule. ``penalty``: λ, of ‖PᵀP − I‖_F².
    ``orthonormalize``: also orthonormalise the basis after each step, as the paper does not.
    """

    lr: float = number(0.005, at_least=0, at_most=1000)
    penalty: float = number(0.1, at_least=0, at_most=10**6)
    solver: PCASolver = PCASolver.adam
    orthonormalize: bool = False


@sampler("golore", "rsotrain.subspace.spectral:golore_sampler")
@dataclass
class GoLoreConfig(SamplerConfig):
    """svd, then haar in the last ``random_fraction`` of the steps (arXiv 2410.11289)."""

    random_fraction: float = number(0.2, at_least=0, at_most=1)
