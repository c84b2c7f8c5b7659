"""The typed settings of optimizers, and the code that belongs to them.

The decorator ``@optimizer`` above the settings class registers a method: files of ``conf/`` name its schema,
the builder imports its code, and tests and tables go through ``OPTIMIZERS``. The code is registered as
``module:name`` because this module does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from rsotrain.config.later import later
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, SMALL, Range, number, numbers
from rsotrain.config.registry import Settings, registering


class OnRefresh(Enum):
    """What a refresh of the basis does to the moments."""

    keep = "keep"
    reset = "reset"
    transport = "transport"


class StateDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


# Name of the schema -> settings.
OPTIMIZERS: "dict[str, type[OptimizerConfig]]" = {}


def optimizer(schema: str, code: str) -> Callable[[Settings], Settings]:
    """Register settings under the name ``schema``. ``code``: ``module:class`` of a ParamGroupOptimizer."""
    return registering(OPTIMIZERS, schema, code)


@dataclass
class OptimizerConfig:
    """The settings of all optimizers.

    ``lr``: peak learning rate of the parameters that AdamW trains: embedding, head and norms. The attention
    and MLP weights get ``lr * scale``. ``block_parameters``: regular expressions that find the names of
    the attention and MLP weights. ``state_dtype``: dtype of the moments. ``decay_at_lr``: attention and MLP
    weights decay at the rate ``lr``, as in the code of GaLore, Fira, APOLLO and SN-SM, not at ``lr * scale``.
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
    decay_at_lr: bool = later(False)
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


class BiasCorrection(Enum):
    """adam_form: none for AdaGrad (``betas[1]`` = 1) and RMSProp (``betas[0]`` = 0), as in SN-SM's code."""

    all_forms = "all_forms"
    adam_form = "adam_form"


@optimizer("sn", "rsotrain.optim.sn_sm:SubsetNorm")
@dataclass
class SNConfig(OptimizerConfig):
    """Momentum of full size with subset-norm second moments (arXiv 2411.07120). ``betas[1]`` = 1 is AdaGrad.

    ``subset_size``: number of neighbours in the smaller dimension that share one second moment; it must
    divide that dimension. null: whole rows (or columns, if there are fewer rows than columns).
    """

    subset_size: int | None = number(None, above=0, at_most=SIZE)
    bias_correction: BiasCorrection = later(BiasCorrection.all_forms)


@optimizer("sn_sm", "rsotrain.optim.sn_sm:SubspaceMomentum")
@dataclass
class SNSMConfig(SubspaceConfig):
    """Momentum in the subspace, the plain gradient outside. ``subset_size``: as in SNConfig; 1 is Adam's."""

    subset_size: int | None = number(None, above=0, at_most=SIZE)
    bias_correction: BiasCorrection = later(BiasCorrection.all_forms)


@optimizer("fira", "rsotrain.optim.residuals:Fira")
@dataclass
class FiraConfig(SolverConfig):
    """GaLore plus the scaled residual (arXiv 2410.01623).

    ``max_growth``: the largest factor by which the residual's norm may grow in one step.
    ``residual_at_lr``: the residual moves weights at the rate ``lr``, as in the authors' code, whose α is a
    factor of the subspace alone, not at ``lr * scale``.
    """

    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)
    residual_at_lr: bool = later(False)


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


@optimizer("normuon", "rsotrain.optim.normuon:NorMuon")
@dataclass
class NorMuonConfig(MuonConfig):
    """Muon with rows of one mean square over time (NorMuon, arXiv 2510.05491).

    ``row_decay``: β₂ of the average of each row's mean square.
    """

    row_decay: float = number(0.95, at_least=0, below=1)


@optimizer("dion2", "rsotrain.optim.dion2:Dion2")
@dataclass
class Dion2Config(OptimizerConfig):
    """A part of the momentum orthogonalised at a time (Dion2, arXiv 2512.16928).

    ``fraction``: of the rows, or columns if there are fewer. ``momentum``: the share that is kept of what
    has been used. ``betas`` and ``eps`` are for AdamW on the rest.
    """

    fraction: float = number(0.25, above=0, at_most=1)
    momentum: float = number(0.95, at_least=0, at_most=1)
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


@optimizer("foam", "rsotrain.optim.foam:Foam")
@dataclass
class FoamConfig(OptimizerConfig):
    """Adam on blocks of 2^``level`` neighbours in a row, plus the residual (FOAM, arXiv 2512.07112)."""

    level: int = number(2, at_least=0, at_most=10)


@optimizer("lion", "rsotrain.optim.lion:Lion")
@dataclass
class LionConfig(OptimizerConfig):
    """The sign of an interpolated momentum (Lion, arXiv 2302.06675).

    ``momentum``: β₁ of the sign and β₂ of the average. ``betas`` and ``eps`` are for AdamW on the rest.
    """

    momentum: tuple[float, float] = numbers(
        (0.9, 0.99), Range(at_least=0, at_most=1), Range(at_least=0, below=1)
    )


@optimizer("scale", "rsotrain.optim.scale:Scale")
@dataclass
class ScaleConfig(OptimizerConfig):
    """Rows of the gradient divided by their RMS, with momentum in the head alone (SCALE, arXiv 2506.16659).

    ``momentum_parameters``, ``column_parameters``: regular expressions that find, among the matrices of
    ``block_parameters``, those with momentum (the head) and those whose columns are normalised instead of
    their rows (the embedding); a tied head goes by the embedding's name. ``momentum``: the share that a step
    keeps. ``eps``: the least RMS.
    """

    momentum: float = number(0.9, at_least=0, below=1)
    momentum_parameters: list[str] = field(default_factory=list)
    column_parameters: list[str] = field(default_factory=list)


@optimizer("racs", "rsotrain.optim.racs:Racs")
@dataclass
class RacsConfig(OptimizerConfig):
    """The gradient divided by the roots of row and column scales (RACS, arXiv 2502.07752).

    ``scale_decay``: β of the averages of the scales. ``iterations``: of the fixed point that gives them.
    ``max_growth``: the largest factor by which the norm of the update may grow in one step. ``betas`` and
    ``eps`` are for AdamW on the rest.
    """

    scale_decay: float = number(0.9, at_least=0, below=1)
    iterations: int = number(5, at_least=1, at_most=99)
    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)


@optimizer("alice", "rsotrain.optim.alice:Alice")
@dataclass
class AliceConfig(SubspaceConfig):
    """Adam in a tracked subspace that is switched, with the residual scaled by columns (arXiv 2502.07752).

    ``subspace_betas``: β₁ and β₂ of the moments in the subspace, β₁ of the residual's scale, too; ``betas``
    are for AdamW on the rest. ``tracking``: β₃ of the average of RᵀR, which the sampler sees beside the
    gradient; 0: none (Alice-0). ``compensation``: α_c, the factor of the residual. ``max_growth``: the
    largest factor by which the norm of the scaled residual may grow in one step.
    """

    subspace_betas: tuple[float, float] = numbers(
        (0.9, 0.9), Range(at_least=0, below=1), Range(at_least=0, below=1)
    )
    tracking: float = number(0.999, at_least=0, below=1)
    compensation: float = number(0.4, at_least=0, at_most=10**6)
    max_growth: float = number(1.01, at_least=1, at_most=FACTOR)


@optimizer("sumo", "rsotrain.optim.sumo:Sumo")
@dataclass
class SumoConfig(SubspaceConfig):
    """Momentum orthogonalised in the subspace, exactly (SUMO, arXiv 2505.24749).

    ``betas`` and ``eps`` are for AdamW on the rest.
    """

    momentum: float = number(0.95, at_least=0, below=1)


@optimizer("adam_mini", "rsotrain.optim.adam_mini:AdamMini")
@dataclass
class AdamMiniConfig(OptimizerConfig):
    """Adam with one second moment for each row, or head (Adam-mini, arXiv 2406.16793).

    ``head_parameters``: regular expressions that find the matrices, those of queries and keys, whose rows
    share a second moment with the others of their head. ``num_heads``: of the queries; a head has the
    ``num_heads``-th part of the matrix's columns for its rows.
    """

    head_parameters: list[str] = field(default_factory=lambda: [r"\.self_attn\.[qk]_proj\.weight$"])
    num_heads: int = number(1, above=0, at_most=SIZE)
