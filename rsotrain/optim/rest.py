"""The rest: the parameters that the method does not train, and the rule that does (``optimizer.rest``).

Embedding and head are matrices, and each rule of ``RestRule`` treats a matrix entry by entry or by rows, of
which each is a token's. Vectors, which are norms and biases, keep Adam with every rule: they are small, and
the papers of these rules leave them to Adam or say nothing of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from rsotrain.config.choices import RestRule, StateDtype
from rsotrain.config.methods import OPTIMIZERS, OptimizerConfig
from rsotrain.errors import require
from rsotrain.optim.base import ParamGroupOptimizer, Settings
from rsotrain.optim.moments import StateKeeper
from rsotrain.optim.parameter_groups import is_norm_or_embedding
from rsotrain.optim.registered import method_of
from rsotrain.optim.state_size import Shape, Weight, WeightsLayout


@dataclass(frozen=True)
class Rule:
    """The update rule of a part of the rest: the settings of its method, and how its moments are kept."""

    name: str
    config: OptimizerConfig
    state_dtype: StateDtype

    @property
    def method(self) -> type[ParamGroupOptimizer]:
        return method_of(self.config)


def rule_for(shape: Shape, config: OptimizerConfig) -> Rule:
    """The rule of a parameter of ``shape`` in the rest of a run with ``config``."""
    chosen = config.rest if len(shape) == 2 else RestRule.adam
    in_8_bits = chosen is RestRule.adam8bit
    schema = "adam" if in_8_bits else chosen.name
    return Rule(
        chosen.name,
        OPTIMIZERS[schema](name=schema, lr=config.lr),
        StateDtype.int8 if in_8_bits else config.state_dtype,
    )


def refuse_rest(config: OptimizerConfig, shapes: Iterable[Shape]) -> None:
    """Raise UserError where ``optimizer.rest`` makes no difference. ``shapes``: those of the rest."""
    rule = config.rest
    require(
        rule is not RestRule.adam8bit or config.state_dtype is not StateDtype.int8,
        "optimizer.state_dtype=int8 keeps the moments of embedding and head in 8 bits, too, so"
        " optimizer.rest=adam8bit adds nothing; leave one of them out",
    )
    require(
        rule is RestRule.adam or any(len(shape) == 2 for shape in shapes),
        f"optimizer.rest={rule.name} is for matrices that optimizer.block_parameters does not find, and"
        f" optimizer={config.name} leaves none that is trained; leave it out",
    )


def sharded_by_rows(config: OptimizerConfig, rest: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of the rest whose rule wants whole rows on a rank."""
    return [p for p in rest if rule_for(tuple(p.shape), config).method.by_rows]


def rest_optimizers(
    config: OptimizerConfig, rest: dict[str, nn.Parameter], settings: Settings
) -> Iterator[ParamGroupOptimizer]:
    """An optimizer for each rule, and one more for what it does not decay. ``settings``: of the method."""
    if settings.betas[1] == 1.0:  # AdaGrad is for the blocks only; the rest keeps Adam
        settings = replace(settings, betas=(settings.betas[0], 0.999))
    parts: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in rest.items():
        spared = bool(config.weight_decay) and not config.decay_norms_and_embeddings
        decayed = not (spared and is_norm_or_embedding(name, parameter))
        rule = rule_for(tuple(parameter.shape), config)
        parts.setdefault((rule.name, decayed), {})[name] = parameter
    for (name, decayed), parameters in sorted(parts.items(), key=lambda part: not part[0][1]):
        rule = rule_for(tuple(next(iter(parameters.values())).shape), config)
        own = replace(
            settings,
            keeper=StateKeeper(getattr(torch, rule.state_dtype.value), settings.keeper.seed),
            weight_decay=settings.weight_decay if decayed else 0.0,
        )
        label = f"rest: {name}{'' if decayed else ', no decay'}"
        yield rule.method(label, parameters, config.lr, own, rule.config)


def rest_state_bytes(config: OptimizerConfig, weights: Sequence[Weight], layout: WeightsLayout) -> int:
    """Bytes of the state of the rest on rank 0 in closed form."""
    total = 0
    for weight in weights:
        rule = rule_for(weight.shape, config)
        own = replace(layout, state_dtype=rule.state_dtype)
        total += rule.method.state_bytes_formula(rule.config, [weight], own)
    return total
