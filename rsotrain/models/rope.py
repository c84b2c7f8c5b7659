"""How rotary frequencies are scaled, by the ``rope_type`` of Hugging Face's configurations."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rsotrain.config.keys import did_you_mean
from rsotrain.config.model import ModelConfig, RopeScalingConfig
from rsotrain.errors import require

Scaling = Callable[[Tensor], Tensor]  # frequencies (head_dim / 2), radians per position -> scaled ones


def _unscaled(frequencies: Tensor) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, *, factor: float) -> Tensor:
    """Positions are divided by ``factor`` (position interpolation, arXiv 2306.15595)."""
    return frequencies / factor


def _llama3(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """LLaMA 3.1's: waves longer than original/low are divided by ``factor``, those shorter than original/high
    are left, and between the two the frequencies are interpolated (arXiv 2407.21783, as in transformers)."""
    wavelengths = 2 * math.pi / frequencies
    turns = original_max_position_embeddings / wavelengths  # in the original context
    share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - share) * frequencies / factor + share * frequencies
    longest = wavelengths > original_max_position_embeddings / low_freq_factor
    shortest = wavelengths < original_max_position_embeddings / high_freq_factor
    return torch.where(longest, frequencies / factor, torch.where(shortest, frequencies, between))


# rope_type -> its function, whose keyword arguments are the fields of RopeScalingConfig that it reads.
ROPE_TYPES: dict[str, Callable[..., Tensor]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
}


def rope_fields(rope_type: str) -> tuple[str, ...]:
    """The fields of RopeScalingConfig that a type reads."""
    parameters = inspect.signature(ROPE_TYPES[rope_type]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def rope_scaling(config: ModelConfig) -> Scaling:
    """Raises UserError for an unknown type, for a field that it needs and for one that it does not read."""
    scaling = config.rope_scaling
    name = scaling.rope_type
    require(
        name in ROPE_TYPES,
        f"model.rope_scaling.rope_type={name} does not exist{did_you_mean(name, list(ROPE_TYPES))}"
        f" (there are: {', '.join(ROPE_TYPES)})",
    )
    needed = rope_fields(name)
    for field in dataclasses.fields(RopeScalingConfig):
        if field.name == "rope_type":
            continue
        value = getattr(scaling, field.name)
        key = f"model.rope_scaling.{field.name}"
        require(
            value is not None or field.name not in needed,
            f"model.rope_scaling.rope_type={name} needs a value of {key}; give it with {key}=…",
        )
        require(
            value is None or field.name in needed,
            f"{key}={value} has no effect with model.rope_scaling.rope_type={name}; leave it out",
        )
    if name == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        require(
            low < high,
            f"model.rope_scaling.low_freq_factor={low} must be less than"
            f" model.rope_scaling.high_freq_factor={high}",
        )
    return partial(ROPE_TYPES[name], **{field: getattr(scaling, field) for field in needed})
