"""The typed settings of each optimizer, and the code that belongs to them.

The decorator ``@optimizer`` above the settings class registers a method: files of ``conf/`` name its schema,
the builder imports its code, and tests and tables go through ``OPTIMIZERS``. The code is registered as
``module:name`` because this module does not import torch. What methods share is in ``method.py``.
"""

from dataclasses import dataclass, field

from rsotrain.config.choices import BasisStorage, BiasCorrection, InnerSolver, NewtonSchulzDtype, Pruning
from rsotrain.config.later import later
from rsotrain.config.meanings import means
from rsotrain.config.method import OPTIMIZERS as OPTIMIZERS
from rsotrain.config.method import OptimizerConfig, SolverConfig, SubspaceConfig, optimizer
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, Range, number, numbers


@optimizer("adam", "rsotrain.optim.adamw:AdamW")
@dataclass
class AdamConfig(OptimizerConfig):
    """AdamW, by torch's fused kernel."""


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
    bias_correction: BiasCorrection = means(
        "which forms of the update have one", later(BiasCorrection.adam_form, before=BiasCorrection.all_forms)
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
    bias_correction: BiasCorrection = means(
        "which forms of the update have one", later(BiasCorrection.adam_form, before=BiasCorrection.all_forms)
    )


@optimizer("fira", "rsotrain.optim.residuals:Fira")
@dataclass
class FiraConfig(SolverConfig):
    """GaLore plus the scaled residual (Fira, arXiv 2410.01623)."""

    max_growth: float = means(
        "largest factor by which the residual's norm grows in a step",
        number(1.01, at_least=1, at_most=FACTOR),
    )
    residual_at_lr: bool = means(
        "move weights by the residual at lr, as the authors' code does, not at lr × scale",
        later(True, before=False),
    )


@optimizer("frugal", "rsotrain.optim.residuals:Frugal")
@dataclass
class FrugalConfig(SolverConfig):
    """Adam in the subspace, signSGD at ``free_scale`` times the rate outside (FRUGAL, arXiv 2411.07837)."""

    free_scale: float = means(
        "factor on the rate for the signs outside the subspace", number(1.0, at_least=0, at_most=10**6)
    )


@optimizer("orbit", "rsotrain.optim.orbit:Orbit")
@dataclass
class OrbitConfig(SolverConfig):
    """Adam in the subspace, and outside it the residual, orthogonalised in groups of rows."""

    free_scale: float = means(
        "factor on the rate outside the subspace", number(1.5, at_least=0, at_most=10**6)
    )
    group: int | float = means(
        "rows that are orthogonalised together: a number, or with a point a fraction of the shorter side",
        number(0.25, above=0, at_most=SIZE),
    )
    ns_steps: int = means("Newton-Schulz iterations", number(5, at_least=1, at_most=99), unit="iterations")


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
    ns_dtype: NewtonSchulzDtype = means(
        "dtype of the Newton-Schulz iterations", later(NewtonSchulzDtype.bfloat16)
    )


@optimizer("normuon", "rsotrain.optim.normuon:NorMuon")
@dataclass
class NorMuonConfig(MuonConfig):
    """Muon with rows of one mean square over time (NorMuon, arXiv 2510.05491)."""

    row_decay: float = means("decay of each row's mean square", number(0.95, at_least=0, below=1))


@optimizer("dion2", "rsotrain.optim.dion2:Dion2")
@dataclass
class Dion2Config(OptimizerConfig):
    """A part of the momentum orthogonalised at a time (Dion2, arXiv 2512.16928).

    ``betas`` and ``eps`` are for AdamW on the rest.
    """

    fraction: float = means(
        "share of the rows, or of the columns if there are fewer, in one step",
        number(0.25, above=0, at_most=1),
    )
    momentum: float = means(
        "share that is kept of the momentum that has been used", number(0.95, at_least=0, at_most=1)
    )
    ns_steps: int = means("Newton-Schulz iterations", number(5, at_least=1, at_most=99), unit="iterations")
    ns_dtype: NewtonSchulzDtype = means(
        "dtype of the Newton-Schulz iterations", later(NewtonSchulzDtype.bfloat16)
    )


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


@optimizer("foam", "rsotrain.optim.foam:Foam")
@dataclass
class FoamConfig(OptimizerConfig):
    """Adam on blocks of neighbours in a row, plus the residual (FOAM, arXiv 2512.07112)."""

    level: int = means("log2 of the neighbours in a block; 0 is Adam", number(2, at_least=0, at_most=10))


@optimizer("lion", "rsotrain.optim.lion:Lion")
@dataclass
class LionConfig(OptimizerConfig):
    """The sign of an interpolated momentum (Lion, arXiv 2302.06675).

    ``betas`` and ``eps`` are for AdamW on the rest.
    """

    momentum: tuple[float, float] = means(
        "β₁ of the sign and β₂ of the momentum's average",
        numbers((0.9, 0.99), Range(at_least=0, at_most=1), Range(at_least=0, below=1)),
    )


@optimizer("scale", "rsotrain.optim.scale:Scale")
@dataclass
class ScaleConfig(OptimizerConfig):
    """Rows of the gradient divided by their RMS, with momentum in the head alone (SCALE, arXiv 2506.16659).

    A tied head goes by the embedding's name. ``eps``: the least RMS.
    """

    momentum: float = means("decay of the momentum", number(0.9, at_least=0, below=1))
    momentum_parameters: list[str] = means(
        "regular expressions that find, of block_parameters, those with momentum: the head",
        field(default_factory=lambda: [r"^lm_head\.weight$"]),
    )
    column_parameters: list[str] = means(
        "regular expressions that find those normalised by columns, not by rows: the embedding",
        field(default_factory=lambda: [r"(^|\.)embed_tokens\.weight$"]),
    )


@optimizer("soap", "rsotrain.optim.soap:Soap")
@dataclass
class SoapConfig(OptimizerConfig):
    """Adam in the eigenbases of Shampoo's preconditioners (SOAP, arXiv 2409.11321).

    ``betas`` are for AdamW on the rest.
    """

    eigenbasis_betas: tuple[float, float] = means(
        "decay of the momentum, and of the second moment and the preconditioners",
        numbers((0.95, 0.95), Range(at_least=0, below=1), Range(at_least=0, below=1)),
    )
    precondition_frequency: int = means(
        "how often a round of power iteration refreshes the bases",
        number(10, above=0, at_most=COUNT),
        unit="optimizer steps",
    )
    max_preconditioner_dim: int = means(
        "longest side of a matrix that has an eigenbasis; a longer one has the identity",
        number(10_000, above=0, at_most=SIZE),
        unit="rows or columns",
    )


@optimizer("racs", "rsotrain.optim.racs:Racs")
@dataclass
class RacsConfig(OptimizerConfig):
    """The gradient divided by the roots of row and column scales (RACS, arXiv 2502.07752).

    ``betas`` and ``eps`` are for AdamW on the rest.
    """

    scale_decay: float = means("decay of the averages of the scales", number(0.9, at_least=0, below=1))
    iterations: int = means(
        "of the fixed point that gives the scales", number(5, at_least=1, at_most=99), unit="iterations"
    )
    max_growth: float = means(
        "largest factor by which the update's norm grows in a step", number(1.01, at_least=1, at_most=FACTOR)
    )


@optimizer("alice", "rsotrain.optim.alice:Alice")
@dataclass
class AliceConfig(SubspaceConfig):
    """Adam in a tracked subspace that is switched, with the residual scaled by columns (arXiv 2502.07752).

    ``betas`` are for AdamW on the rest.
    """

    subspace_betas: tuple[float, float] = means(
        "decay of the moments in the subspace, the first that of the residual's scale, too",
        numbers((0.9, 0.9), Range(at_least=0, below=1), Range(at_least=0, below=1)),
    )
    tracking: float = means(
        "decay of the average of RᵀR, which the sampler sees beside the gradient; 0: none (Alice-0)",
        number(0.999, at_least=0, below=1),
    )
    compensation: float = means("factor of the residual", number(0.4, at_least=0, at_most=10**6))
    max_growth: float = means(
        "largest factor by which the residual's norm grows in a step",
        number(1.01, at_least=1, at_most=FACTOR),
    )


@optimizer("sumo", "rsotrain.optim.sumo:Sumo")
@dataclass
class SumoConfig(SubspaceConfig):
    """Momentum orthogonalised in the subspace, exactly (SUMO, arXiv 2505.24749).

    ``betas`` and ``eps`` are for AdamW on the rest.
    """

    momentum: float = means("decay of the momentum", number(0.95, at_least=0, below=1))


@optimizer("adam_mini", "rsotrain.optim.adam_mini:AdamMini")
@dataclass
class AdamMiniConfig(OptimizerConfig):
    """Adam with one second moment for each row, or head (Adam-mini, arXiv 2406.16793)."""

    head_parameters: list[str] = means(
        "regular expressions that find the matrices, of queries and keys, with one second moment a head",
        field(default_factory=list),
    )
    num_heads: int = means("heads of the queries", number(1, above=0, at_most=SIZE), unit="heads")


@optimizer("lora", "rsotrain.optim.lora:LoRA")
@dataclass
class LoRAConfig(OptimizerConfig):
    """Adam on the factors of W + (α/r) B A; W stays as it begins (LoRA, arXiv 2106.09685)."""

    rank: int | float = means(
        "r: a number, or with a point a fraction of the smaller dimension of each weight",
        number(0.25, above=0, at_most=SIZE),
    )
    alpha: float = means("α: B A counts α/r times", number(32.0, above=0, at_most=FACTOR))


@optimizer("relora", "rsotrain.optim.lora:ReLoRA")
@dataclass
class ReLoRAConfig(LoRAConfig):
    """LoRA whose product is merged into W again and again (ReLoRA, arXiv 2307.05695)."""

    merge_every: int = means(
        "T: how often B A is added to W and begins anew",
        number(200, above=0, at_most=COUNT),
        unit="optimizer steps",
    )
    restart_warmup_steps: int = means(
        "steps over which the rates of all weights rise again after each merge",
        number(10, at_least=0, at_most=COUNT),
        unit="optimizer steps",
    )
    pruning: Pruning = means("which entries of the moments a merge sets to 0", Pruning.magnitude)
    prune_ratio: float = means("share of these entries; 1: all", number(0.99, at_least=0, at_most=1))
