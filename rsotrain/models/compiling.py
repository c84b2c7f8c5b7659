"""Compiled blocks, and what happens where there is no compiler."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rsotrain.models.llama import Llama
from rsotrain.models.subspace_linear import sampled_bases

# Variants of a block: with gradients and without, one and several batch sizes, and for RSO each set of inputs
# that are observed together when refreshes are staggered.
RECOMPILE_LIMIT = 32


def is_worthwhile(device: torch.device) -> bool:
    """Does compiling pay, as a rule? On a CPU it costs a minute for a few percent."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compile_blocks(model: Llama) -> None:
    """Compile each block's forward; all share one graph. Hooks, such as FSDP's, stay outside of it.

    Where the compiler fails, as where there is no C++ compiler or no Triton, the blocks go on as they were,
    with one warning.
    """
    for block in model.model.layers:
        block.forward = _compiled(block, model)


def _compiled(block: nn.Module, model: Llama) -> Callable[..., Any]:
    # what a backend raises comes as BackendCompilerFailed; that Triton is missing, or the GPU too old for it,
    # as a sibling of it
    from torch._dynamo.exc import ShortenTraceback

    limit: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT}  # which torch's overloads do not name
    compiled = torch.compile(block.forward, **limit)

    def forward(*args: Any, **keywords: Any) -> Any:
        try:
            with sampled_bases(block):  # random numbers have no place in a graph
                return compiled(*args, **keywords)
        except ShortenTraceback as error:
            _give_up(model, error)
            return type(block).forward(block, *args, **keywords)

    return forward


def _give_up(model: Llama, error: Exception) -> None:
    for block in model.model.layers:
        del block.forward  # the class's own is left
    lines = str(error).strip().splitlines()
    cause = lines[1] if lines[0].endswith("raised:") and len(lines) > 1 else lines[0]
    said = f"compile=true: the compiler failed ({cause}); the run goes on without it"
    warnings.warn(said, RuntimeWarning, stacklevel=2)
