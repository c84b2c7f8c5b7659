"""What a model consists of, read from its modules: named weights with their kinds, shared inputs, FLOPs.

There is no second description that has to follow the code: a model on the meta device takes milliseconds and
no memory, whatever its size, and cannot be wrong about its own parameters. What checks it from outside are
the published sizes, the parameters of transformers' classes and a count of the products that really run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn


class Kind(Enum):
    """What a parameter is. Modules say it of their own parameters by an attribute ``kinds``."""

    embedding = "embedding"
    linear = "linear"  # (out, in)
    gain = "gain"  # of a norm
    bias = "bias"
    down_factor = "down factor"  # A of an adapter, (r, in)
    up_factor = "up factor"  # B of an adapter, (out, r)


FACTORS = (Kind.down_factor, Kind.up_factor)


@dataclass(frozen=True)
class Weight:
    """``shape``: (out, in), or (size,). ``input_group``: for a linear whose input can be projected, the name
    of the first linear that reads the same input; empty for all other weights."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    input_group: str = ""


@dataclass(frozen=True)
class Place:
    """A linear in the model, and where it is held."""

    name: str  # of its weight
    parent: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.parent, self.attribute).weight


def input_groups(model: nn.Module) -> Iterator[list[Place]]:
    """The linears that have an input of their own to project, in groups that read the same input.

    Modules tell them by an attribute ``shared_inputs``: names of linears, by the input they read.
    """
    for prefix, parent in model.named_modules():
        for group in getattr(parent, "shared_inputs", ()):
            yield [
                Place(f"{prefix}.{attribute}.weight".lstrip("."), parent, attribute) for attribute in group
            ]


def weights_of(model: nn.Module) -> list[Weight]:
    """Every parameter, tied ones once, in the order of ``named_parameters``; whole, where sharded."""
    group_names = {place.name: group[0].name for group in input_groups(model) for place in group}
    kinds = _kinds(model)
    return [
        Weight(name, tuple(parameter.shape), kinds[name], group_names.get(name, ""))
        for name, parameter in model.named_parameters()
    ]


def _kinds(model: nn.Module) -> dict[str, Kind]:
    found = {}
    for prefix, module in model.named_modules():
        kinds = {"weight": Kind.embedding} if isinstance(module, nn.Embedding) else None
        for name, _ in module.named_parameters(recurse=False):
            known = kinds or getattr(module, "kinds", {})
            assert name in known, f"{type(module).__name__} does not say in `kinds` what its {name} is"
            found[f"{prefix}.{name}".lstrip(".")] = known[name]
    return found


def count_elements(model: nn.Module) -> int:
    """Number of parameters; a tied head is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Floating-point operations of forward and backward per token, matrix products only.

    Modules with products say how many by a method ``flops_per_token(seq_len)``. What is computed again in
    the backward pass does not count, nor does the embedding's look-up; a tied head's product does.
    """
    return sum(
        module.flops_per_token(seq_len)  # type: ignore[operator]
        for module in model.modules()
        if hasattr(module, "flops_per_token")
    )
