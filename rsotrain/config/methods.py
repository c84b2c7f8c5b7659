"""The typed settings of optimizers and samplers, and the code that belongs to them.

The decorator ``@optimizer`` or ``@sampler`` above the settings class registers a method: files of ``conf/``
name its schema, the builders import its code, and tests and tables go through ``OPTIMIZERS`` and
``SAMPLERS``. The code is registered as ``module:name`` because this module does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from omegaconf import MISSING

from rsotrain.config.later import later
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, SMALL, Range, number, numbers


class OnRefresh(Enum):
    """What a refresh of the basis does to the moments."""

    keep = "keep"
    reset = "reset"
    transport = "transport"


class StateDtype(Enum):
    """int8: 8 bits an element and a float32 scale a block (``rsotrain.optim.blocks``)."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class WeightRounding(Enum):
    """How an updated bfloat16 weight is rounded. stochastic: up or down at random, such that no update is
    lost on average; the gains of norms, which lie around 1 and move by little, are float32 then. nearest: as
    in the papers' runs, with bfloat16 gains; updates below 2⁻⁹ of a weight are lost."""

    stochastic = "stochastic"
    nearest = "nearest"


Settings = TypeVar("Settings", bound=type)

# Name of the schema -> settings; settings -> ``module:name`` of the code.
OPTIMIZERS: "dict[str, type[OptimizerConfig]]" = {}
SAMPLERS: "dict[str, type[SamplerConfig]]" = {}
CODE: dict[type, str] = {}


def optimizer(schema: str, code: str) -> Callable[[Settings], Settings]:
    """Register settings under the name ``schema``. ``code``: ``module:class`` of a ParamGroupOptimizer."""
    return _registering(OPTIMIZERS, schema, code)


def sampler(schema: str, code: str) -> Callable[[Settings], Settings]:
    """The same for a sampler. ``code``: ``module:function`` that builds a Sampler from settings, or empty."""
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
    """The settings of all optimizers.

    ``lr``: peak learning rate of the parameters that AdamW trains: embedding, head and norms. The attention
    and MLP weights get ``lr * scale``. ``block_parameters``: regular expressions that find the names of
    the attention and MLP weights. ``state_dtype``: dtype of the moments. ``weight_decay`` is decoupled and
    acts on matrices; on norms, biases, embedding and head, too, with ``decay_norms_and_embeddings``.
    ``weight_rounding``: of weights in bfloat16 (precision=bf16), where it is stochastic by default.
    """

    name: str = MISSING
    lr: float = number(at_least=0, at_most=1000)
    scale: float = number(1.0, at_least=0, at_most=10**6)
    betas: tuple[float, float] = numbers(
        (0.9, 0.999), Range(at_least=0, below=1), Range(at_least=0, at_most=1)
    )
    eps: float = number(1e-8, at_least=SMALL, at_most=1)
    weight_decay: float = number(0.0, at_least=0, at_most=1000)
    decay_norms_and_embeddings: bool = later(False, before=True, matters_with="weight_decay")
    state_dtype: StateDtype = StateDtype.float32
    weight_rounding: WeightRounding = later(WeightRounding.nearest)
    block_parameters: list[str] = field(
        default_factory=lambda: [
            r"\.self_attn\.[qkvo]_proj\.weight$",
            r"\.mlp\.(gate|up|down)_proj\.weight$",
        ]
    )


@optimizer("adam", "rsotrain.optim.adamw:AdamW")
@dataclass
class AdamConfig(OptimizerConfig):
    """AdamW, by torch's fused kernel."""


@dataclass
class SubspaceConfig(OptimizerConfig):
    """The settings of all optimizers with low-rank bases.

    ``rank``: an integer, or a fraction (0 < rank ≤ 1.0, written with a point) of the projected dimension of
    each matrix. ``update_proj_gap``: T, the number of optimizer steps between two refreshes of a basis.
    ``staggered``: spread the refreshes of the matrices over these T steps instead of doing all at once, so
    that RSO need not hold all Gram matrices at the same time.
    """

    rank: int | float = number(0.25, above=0, at_most=SIZE)
    update_proj_gap: int = number(200, above=0, at_most=COUNT)
    on_refresh: OnRefresh = OnRefresh.keep
    staggered: bool = False


class InnerSolver(Enum):
    """The update rule in the subspace. momentum: the bias-corrected average of gradients, with betas[0]."""

    adam = "adam"
    momentum = "momentum"
    adagrad = "adagrad"


@dataclass
class SolverConfig(SubspaceConfig):
    """The settings of optimizers with a choice of the rule in the subspace; all were published with Adam."""

    solver: InnerSolver = later(InnerSolver.adam)


@optimizer("galore", "rsotrain.optim.galore:GaLore")
@dataclass
class GaLoreConfig(SolverConfig):
    """Adam in the subspace, no update outside (GaLore, arXiv 2403.03507; I3S and OSD by their samplers)."""


@optimizer("sn", "rsotrain.optim.sn_sm:SubsetNorm")
@dataclass
class SNConfig(OptimizerConfig):
    """Momentum of full size with subset-norm second moments (arXiv 2411.07120). ``betas[1]`` = 1 is AdaGrad.

    ``subset_size``: number of neighbours in the smaller dimension that share one second moment; it must
    divide that dimension. null: whole rows (or columns, if there are fewer rows than columns).
    """

    subset_size: int | None = number(None, above=0, at_most=SIZE)


@optimizer("sn_sm", "rsotrain.optim.sn_sm:SubspaceMomentum")
@dataclass
class SNSMConfig(SubspaceConfig):
    """Momentum in the subspace, the plain gradient outside. ``subset_size``: as in SNConfig; 1 is Adam's."""

    subset_size: int | None = number(None, above=0, at_most=SIZE)


@optimizer("fira", "rsotrain.optim.residuals:Fira")
@dataclass
class FiraConfig(SolverConfig):
    """GaLore plus the scaled residual (arXiv 2410.01623).

    ``max_growth``: the largest factor by which the residual's norm may grow in one step.
    """

    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)


@optimizer("frugal", "rsotrain.optim.residuals:Frugal")
@dataclass
class FrugalConfig(SolverConfig):
    """Adam in the subspace, signSGD at ``free_scale`` times the rate outside (FRUGAL, arXiv 2411.07837)."""

    free_scale: float = number(1.0, at_least=0, at_most=10**6)


@optimizer("apollo", "rsotrain.optim.residuals:Apollo")
@dataclass
class ApolloConfig(SolverConfig):
    """The gradient scaled per channel, or by one factor with ``per_tensor`` (APOLLO, arXiv 2412.05270).

    ``max_growth``: the largest factor by which the norm of the update may grow in one step.
    """

    per_tensor: bool = False
    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)


@optimizer("ldadam", "rsotrain.optim.residuals:LDAdam")
@dataclass
class LDAdamConfig(SubspaceConfig):
    """Low-rank Adam with a new basis every step, transported moments and error feedback (arXiv 2410.16103).

    ``rho``: the weight of the momentum, next to that of the gradient, in the matrix that the sampler uses.
    """

    rho: float = number(0.908, at_least=0, at_most=1)


@optimizer("muon", "rsotrain.optim.muon:Muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """torch's Muon, with learning rates on AdamW's scale. ``betas`` and ``eps`` are for AdamW on the rest."""

    momentum: float = number(0.95, at_least=0, at_most=1)
    nesterov: bool = True
    ns_steps: int = number(5, at_least=1, at_most=99)


class BasisStorage(Enum):
    """stored: bases are optimizer state. regenerated: each use samples the basis again from its seed."""

    stored = "stored"
    regenerated = "regenerated"


@optimizer("rso", "rsotrain.optim.rso:RSO")
@dataclass
class RSOConfig(SubspaceConfig):
    """Trains B in W + B Pᵀ; P is random and projects the input of the linear (RSO, arXiv 2502.07222).

    ``rank``: an integer, or a fraction of the largest min(in, out) of the linears that share an input, which
    makes 0.25 hidden/4 everywhere. ``basis_scale``: multiply orthonormal bases by √(in/rank), for
    E[PPᵀ] = I. ``proximal_eta``: η of the proximal term ‖B‖²/(2η); null: no such term.
    ``refresh_warmup_steps``: after each refresh the learning rate rises linearly over so many steps.
    ``projection``: how the bases are kept.
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
    """gram: eigenvectors of the smaller side's Gram matrix. full: torch.linalg.svd, with its signs."""

    gram = "gram"
    full = "full"


@sampler("svd", "rsotrain.subspace.spectral:svd_sampler")
@dataclass
class SvdConfig(SamplerConfig):
    """The dominant singular vectors (GaLore, arXiv 2403.03507)."""

    solver: SvdSolver = SvdSolver.gram


@sampler("importance", "rsotrain.subspace.spectral:importance_sampler")
@dataclass
class ImportanceConfig(SamplerConfig):
    """Singular vectors sampled without replacement, with weights σ ** ``power`` (I3S, arXiv 2502.05790)."""

    power: float = number(1.0, above=0, at_most=100)


@sampler("randomized_svd", "rsotrain.subspace.spectral:randomized_svd_sampler")
@dataclass
class RandomizedSvdConfig(SamplerConfig):
    """``rounds`` block power iterations from the basis in use, and two more at the first refresh."""

    rounds: int = number(2, at_least=1, at_most=100)


@sampler("mixture", "rsotrain.subspace.spectral:mixture_sampler")
@dataclass
class MixtureConfig(SamplerConfig):
    """svd for ``principal_fraction`` of the rank, haar in its orthogonal complement for the others."""

    principal_fraction: float = number(0.5, at_least=0, at_most=1)


@sampler("haar", "rsotrain.subspace.random_bases:haar_sampler")
@dataclass
class HaarConfig(SamplerConfig):
    """A uniformly random orthonormal basis."""


@sampler("gaussian", "rsotrain.subspace.random_bases:gaussian_sampler")
@dataclass
class GaussianConfig(SamplerConfig):
    """A basis of independent N(0, 1/rank) entries, which is not orthonormal but has E[PPᵀ] = I."""


@sampler("coordinate", "rsotrain.subspace.random_bases:coordinate_sampler")
@dataclass
class CoordinateConfig(SamplerConfig):
    """A basis of random coordinate axes."""


@sampler("topk_norm", "rsotrain.subspace.spectral:topk_norm_sampler")
@dataclass
class TopkNormConfig(SamplerConfig):
    """The coordinate axes along which the gradient has the largest norm."""


@sampler("srht", "rsotrain.subspace.random_bases:srht_sampler")
@dataclass
class SRHTConfig(SamplerConfig):
    """Random columns of a Hadamard (times cosine) matrix with random signs; orthonormal."""


class PCASolver(Enum):
    adam = "adam"
    sgd = "sgd"


@sampler("online_pca", "rsotrain.subspace.online_pca:online_pca_sampler")
@dataclass
class OnlinePCAConfig(SamplerConfig):
    """A step of online PCA at each refresh, after the update of the weights (OSD, arXiv 2408.12857).

    ``lr``: peak learning rate of the basis, which follows the run's schedule. ``penalty``: λ, the weight of
    ‖PᵀP − I‖_F². ``orthonormalize``: also orthonormalise the basis after each step, unlike the paper.
    """

    lr: float = number(0.005, at_least=0, at_most=1000)
    penalty: float = number(0.1, at_least=0, at_most=10**6)
    solver: PCASolver = PCASolver.adam
    orthonormalize: bool = False


@sampler("golore", "rsotrain.subspace.spectral:golore_sampler")
@dataclass
class GoLoreConfig(SamplerConfig):
    """svd, then haar in the last ``random_fraction`` of the steps (GoLore, arXiv 2410.11289)."""

    random_fraction: float = number(0.2, at_least=0, at_most=1)
