"""The feed-forward part of a decoder layer."""

from torch import Tensor, nn

from rsotrain.config.schema import ModelConfig
from rsotrain.models.layers import Linear, RMSNorm, apply_normed


class SwiGLU(nn.Module):
    """down(silu(gate(y)) · up(y)) of y = ``norm(x)``."""

    shared_inputs = (("gate_proj", "up_proj"), ("down_proj",))

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = apply_normed(x, norm, self.gate_proj, self.up_proj)
        return self.down_proj.apply_swiglu(gate, up)
