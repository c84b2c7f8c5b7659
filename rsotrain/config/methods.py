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
from rsotrain.config.meanings import means
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
    """The settings of all optimizers."""

    name: str = means("name of the method", MISSING)
    lr: float = means(
        "peak rate of embedding, head and norms; attention and MLP weights get lr × scale",
        number(at_least=0, at_most=1000),
    )
    scale: float = means(
        "factor on lr for the attention and MLP weights", number(1.0, at_least=0, at_most=10**6)
    )
    betas: tuple[float, float] = means(
        "decay of the first and the second moment",
        numbers((0.9, 0.999), Range(at_least=0, below=1), Range(at_least=0, at_most=1)),
    )
    eps: float = means("added to the root of the second moment", number(1e-8, at_least=SMALL, at_most=1))
    weight_decay: float = means(
        "decoupled weight decay, as AdamW has it", number(0.0, at_least=0, at_most=1000)
    )
    decay_norms_and_embeddings: bool = means(
        "weight decay also of norms, biases, embedding and head, not of matrices alone",
        later(False, before=True, matters_with="weight_decay"),
    )
    state_dtype: StateDtype = means("how the moments are stored", StateDtype.float32)
    weight_rounding: WeightRounding = means(
        "stochastic by default with precision=bf16", later(WeightRounding.nearest)
    )
    block_parameters: list[str] = means(
        "regular expressions that find the names of the attention and MLP weights",
        field(
            default_factory=lambda: [
                r"\.self_attn\.[qkvo]_proj\.weight$",
                r"\.mlp\.(gate|up|down)_proj\.weight$",
            ]
        ),
    )


@optimizer("adam", "rsotrain.optim.adamw:AdamW")
@dataclass
class AdamConfig(OptimizerConfig):
    """AdamW, by torch's fused kernel."""


@dataclass
class SubspaceConfig(OptimizerConfig):
    """The settings of all optimizers with low-rank bases."""

    rank: int | float = means(
        "rank of the basis: a number, or with a point a fraction of the projected dimension",
        number(0.25, above=0, at_most=SIZE),
    )
    update_proj_gap: int = means(
        "T: how often the basis is drawn again", number(200, above=0, at_most=COUNT), unit="optimizer steps"
    )
    on_refresh: OnRefresh = means("what a new basis does to the moments", OnRefresh.keep)
    staggered: bool = means(
        "spread the draws of all matrices over these steps instead of making all at once", False
    )


class InnerSolver(Enum):
    """The update rule in the subspace. momentum: the bias-corrected average of gradients, with betas[0]."""

    adam = "adam"
    momentum = "momentum"
    adagrad = "adagrad"


@dataclass
class SolverConfig(SubspaceConfig):
    """The settings of optimizers with a choice of the rule in the subspace; all were published with Adam."""

    solver: InnerSolver = means("update rule in the subspace", later(InnerSolver.adam))


@optimizer("galore", "rsotrain.optim.galore:GaLore")
@dataclass
class GaLoreConfig(SolverConfig):
    """Adam in the subspace, no update outside (GaLore, arXiv 2403.03507; I3S and OSD by their samplers)."""


@optimizer("sn", "rsotrain.optim.sn_sm:SubsetNorm")
@dataclass
class SNConfig(OptimizerConfig):
    """Momentum, subset-norm second moments (SN, arXiv 2411.07120). ``betas[1]`` = 1 is AdaGrad."""

    subset_size: int | None = means(
        "neighbours in the smaller dimension, a divisor of it, that share a second moment; null: all",
        number(None, above=0, at_most=SIZE),
        unit="weights",
    )


@optimizer("sn_sm", "rsotrain.optim.sn_sm:SubspaceMomentum")
@dataclass
class SNSMConfig(SubspaceConfig):
    """Momentum in the subspace, the gradient outside, subset-norm second moments (arXiv 2411.07120)."""

    subset_size: int | None = means(
        "neighbours that share a second moment, a divisor of the smaller dimension; null: all; 1: as Adam",
        number(None, above=0, at_most=SIZE),
        unit="weights",
    )


@optimizer("fira", "rsotrain.optim.residuals:Fira")
@dataclass
class FiraConfig(SolverConfig):
    """GaLore plus the scaled residual (Fira, arXiv 2410.01623)."""

    max_growth: float = means(
        "largest factor by which the residual's norm grows in a step",
        number(1.01, at_least=1, at_most=FACTOR),
    )


@optimizer("frugal", "rsotrain.optim.residuals:Frugal")
@dataclass
class FrugalConfig(SolverConfig):
    """Adam in the subspace, signSGD at ``free_scale`` times the rate outside (FRUGAL, arXiv 2411.07837)."""

    free_scale: float = means(
        "factor on the rate for the signs outside the subspace", number(1.0, at_least=0, at_most=10**6)
    )


@optimizer("apollo", "rsotrain.optim.residuals:Apollo")
@dataclass
class ApolloConfig(SolverConfig):
    """The gradient scaled per channel, or by one factor with ``per_tensor`` (APOLLO, arXiv 2412.05270)."""

    per_tensor: bool = means("one factor for the whole matrix instead of one for each channel", False)
    max_growth: float = means(
        "largest factor by which the update's norm grows in a step", number(1.01, at_least=1, at_most=FACTOR)
    )


@optimizer("ldadam", "rsotrain.optim.residuals:LDAdam")
@dataclass
class LDAdamConfig(SubspaceConfig):
    """Low-rank Adam, a new basis every step, error feedback (LDAdam, arXiv 2410.16103)."""

    rho: float = means(
        "weight of the momentum, beside the gradient's, in the matrix that the sampler sees",
        number(0.908, at_least=0, at_most=1),
    )


@optimizer("muon", "rsotrain.optim.muon:Muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """torch's Muon, with learning rates on AdamW's scale. ``betas`` and ``eps`` are for AdamW on the rest."""

    momentum: float = means("decay of the momentum", number(0.95, at_least=0, at_most=1))
    nesterov: bool = means("Nesterov's momentum", True)
    ns_steps: int = means("Newton-Schulz iterations", number(5, at_least=1, at_most=99), unit="iterations")


class BasisStorage(Enum):
    """stored: bases are optimizer state. regenerated: each use samples the basis again from its seed."""

    stored = "stored"
    regenerated = "regenerated"


@optimizer("rso", "rsotrain.optim.rso:RSO")
@dataclass
class RSOConfig(SubspaceConfig):
    """Trains B in W + B Pᵀ; P is random and projects the input of the linear (RSO, arXiv 2502.07222).

    A fraction as ``rank`` is one of the largest min(in, out) of the linears that share an input, which makes
    0.25 hidden/4 everywhere.
    """

    solver: InnerSolver = means("update rule of B", InnerSolver.adam)
    basis_scale: bool = means("multiply orthonormal bases by √(in/rank), for E[PPᵀ] = I", True)
    proximal_eta: float | None = means(
        "η of the proximal term ‖B‖²/(2η); null: no such term", number(None, above=0, at_most=FACTOR)
    )
    refresh_warmup_steps: int = means(
        "steps over which the rate rises again after each draw",
        number(0, at_least=0, at_most=COUNT),
        unit="optimizer steps",
    )
    projection: BasisStorage = means("how the bases are kept", BasisStorage.stored)


# --- sampler -----------------------------------------------------------------------------------


@dataclass
class SamplerConfig:
    name: str = means("name of the sampler", MISSING)


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

    solver: SvdSolver = means("how the singular vectors are computed", SvdSolver.gram)


@sampler("importance", "rsotrain.subspace.spectral:importance_sampler")
@dataclass
class ImportanceConfig(SamplerConfig):
    """Singular vectors sampled without replacement, with weights σ ** ``power`` (I3S, arXiv 2502.05790)."""

    power: float = means(
        "exponent of the singular values in the weights of the draw", number(1.0, above=0, at_most=100)
    )


@sampler("randomized_svd", "rsotrain.subspace.spectral:randomized_svd_sampler")
@dataclass
class RandomizedSvdConfig(SamplerConfig):
    """``rounds`` block power iterations from the basis in use, and two more at the first refresh."""

    rounds: int = means(
        "power iterations for a draw; the first has two more",
        number(2, at_least=1, at_most=100),
        unit="iterations",
    )


@sampler("mixture", "rsotrain.subspace.spectral:mixture_sampler")
@dataclass
class MixtureConfig(SamplerConfig):
    """svd for ``principal_fraction`` of the rank, haar in its orthogonal complement for the others."""

    principal_fraction: float = means("share of the rank that svd fills", number(0.5, at_least=0, at_most=1))


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
    """A step of online PCA at each refresh, after the update of the weights (OSD, arXiv 2408.12857)."""

    lr: float = means(
        "peak rate of the basis, which follows the run's schedule", number(0.005, at_least=0, at_most=1000)
    )
    penalty: float = means("λ, weight of ‖PᵀP − I‖²", number(0.1, at_least=0, at_most=10**6))
    solver: PCASolver = means("update rule of the basis", PCASolver.adam)
    orthonormalize: bool = means("also orthonormalise the basis after each step, unlike the paper", False)


@sampler("golore", "rsotrain.subspace.spectral:golore_sampler")
@dataclass
class GoLoreConfig(SamplerConfig):
    """svd, then haar in the last ``random_fraction`` of the steps (GoLore, arXiv 2410.11289)."""

    random_fraction: float = means(
        "share of the training, at its end, with random bases", number(0.2, at_least=0, at_most=1)
    )
