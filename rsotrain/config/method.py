"""The settings that optimizers share, and the registry of all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rsotrain.config.choices import InnerSolver, OnRefresh, RestRule, StateDtype, WeightRounding
from rsotrain.config.later import later
from rsotrain.config.meanings import means
from rsotrain.config.ranges import COUNT, SIZE, SMALL, Range, number, numbers
from rsotrain.config.registry import Settings, registering

# Name of the schema -> settings.
OPTIMIZERS: "dict[str, type[OptimizerConfig]]" = {}


def optimizer(schema: str, code: str) -> Callable[[Settings], Settings]:
    """Register settings under the name ``schema``. ``code``: ``module:class`` of a ParamGroupOptimizer, or
    the class alone where it stands in the file of the settings."""
    return registering(OPTIMIZERS, schema, code)


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
    decay_at_lr: bool = means(
        "decay attention and MLP weights at lr, as GaLore's and its successors' code, not at lr × scale",
        later(False, matters_with="weight_decay"),
    )
    state_dtype: StateDtype = means("how the moments are stored", StateDtype.float32)
    rest: RestRule = means(
        "rule of the other matrices, which are embedding and head; norms and biases always have Adam",
        later(RestRule.adam),
    )
    weight_rounding: WeightRounding = means(
        "stochastic by default with precision=bf16",
        later(WeightRounding.nearest, of_new_runs=WeightRounding.stochastic),
    )
    update_in_backward: bool = means(
        "update within the backward pass, and keep no gradients; for one process and one micro-batch",
        later(False),
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
    groups: list[dict[str, Any]] = means(
        "matrices that other methods train: {pattern, optimizer, …} each, the first pattern that fits counts",
        later(field(default_factory=list)),
    )


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


@dataclass
class SolverConfig(SubspaceConfig):
    """The settings of optimizers with a choice of the rule in the subspace; all were published with Adam."""

    solver: InnerSolver = means("update rule in the subspace", later(InnerSolver.adam))
