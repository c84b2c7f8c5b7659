"""Lets RSO and LoRA have the linears of a model that is not ours: of Hugging Face's LLaMA, say."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from rsotrain.models.architecture import input_groups

# Children of one module that read the same input, in LLaMA and the models that followed it.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def make_projectable(model: nn.Module, patterns: Iterable[str]) -> None:
    """Say of each ``nn.Linear`` whose weight's name a pattern matches with which others it shares its input.

    They are then ``input_groups`` of the model. Modules that say so themselves are left as they are.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    ours = {id(place.parent) for group in input_groups(model) for place in group}
    for prefix, parent in model.named_modules():
        names = [
            name
            for name, child in parent.named_children()
            if type(child) is nn.Linear
            and any(regex.search(f"{prefix}.{name}.weight".lstrip(".")) for regex in compiled)
        ]
        if names and id(parent) not in ours:
            parent.shared_inputs = _grouped(names)


def _grouped(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The names in groups that read the same input."""
    together = [tuple(name for name in group if name in names) for group in _TOGETHER]
    alone = [(name,) for name in names if not any(name in group for group in together)]
    return (*(group for group in together if group), *alone)
