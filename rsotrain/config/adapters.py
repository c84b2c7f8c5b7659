"""The settings of methods that train low-rank factors beside frozen weights."""

from dataclasses import dataclass
from enum import Enum

from rsotrain.config.meanings import means
from rsotrain.config.methods import OptimizerConfig, optimizer
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, number


@optimizer("lora", "rsotrain.optim.lora:LoRA")
@dataclass
class LoRAConfig(OptimizerConfig):
    """Adam on the factors of W + (α/r) B A; W stays as it begins (LoRA, arXiv 2106.09685)."""

    rank: int | float = means(
        "r: a number, or with a point a fraction of the smaller dimension of each weight",
        number(0.25, above=0, at_most=SIZE),
    )
    alpha: float = means("α: B A counts α/r times", number(32.0, above=0, at_most=FACTOR))


class Pruning(Enum):
    """Which entries of the moments become zero when the factors are reset: those that are smallest in
    magnitude, or random ones."""

    magnitude = "magnitude"
    random = "random"


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
