"""The parts that a decoder layer is put together from: one line for each that a configuration can name.

A block is built from (config, attention, mlp, activation_checkpointing) and maps (x, tables, mask) to x; an
attention from (config), mapping (x, norm, tables, mask), and an MLP from (config), mapping (x, norm), to
what is added to x. Linears whose names end in q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj
are those that ``optimizer.block_parameters`` matches. All else is read from the modules themselves by
``rsotrain.models.architecture``: parameters and their kinds, inputs that linears share (``shared_inputs``),
FLOPs (``flops_per_token``, for products that are not those of a ``Linear``). An export refuses parts that
transformers' classes lack. What needs a number of its own gets a field in ``ModelConfig``, too.
"""

from collections.abc import Mapping

from torch import nn

from rsotrain.config.keys import did_you_mean
from rsotrain.config.schema import ActivationCheckpointing, ModelConfig
from rsotrain.errors import require
from rsotrain.models.attention import CausalAttention
from rsotrain.models.block import PreNormBlock
from rsotrain.models.mlp import SwiGLU

PARTS: dict[str, dict[str, type[nn.Module]]] = {
    "block": {"pre_norm": PreNormBlock},
    "attention": {"causal": CausalAttention},
    "mlp": {"swiglu": SwiGLU},
}


def build_block(config: ModelConfig, activation_checkpointing: ActivationCheckpointing) -> nn.Module:
    """One decoder layer. Raises UserError for a part that the tables lack."""
    block, attention, mlp = (_chosen(config, field, known) for field, known in PARTS.items())
    return block(config, attention(config), mlp(config), activation_checkpointing)


def _chosen(config: ModelConfig, field: str, known: Mapping[str, type[nn.Module]]) -> type[nn.Module]:
    name = getattr(config, field)
    near = did_you_mean(name, list(known))
    require(name in known, f"model.{field}={name} does not exist{near} (there are: {', '.join(known)})")
    return known[name]
