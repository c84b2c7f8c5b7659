"""A decoder layer around its attention and its MLP, and what of it the backward pass computes again."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsotrain.config.schema import ActivationCheckpointing, ModelConfig
from rsotrain.models.attention import RotaryTables, Within
from rsotrain.models.layers import RMSNorm


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), and then x + mlp(norm(x)).

    A subclass changes what is added to x: ``attention_branch`` and ``mlp_branch``.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: nn.Module,
        mlp: nn.Module,
        activation_checkpointing: ActivationCheckpointing,
    ) -> None:
        super().__init__()
        # Registered in Hugging Face's order, which optimizer states are listed in.
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor, tables: RotaryTables, within: Within = None) -> Tensor:
        if self.activation_checkpointing is ActivationCheckpointing.block:
            return _recomputed(self._layer, x, tables, within)
        return self._layer(x, tables, within)

    def _layer(self, x: Tensor, tables: RotaryTables, within: Within) -> Tensor:
        x = x + self.attention_branch(x, tables, within)
        if self.activation_checkpointing is ActivationCheckpointing.mlp:
            return x + _recomputed(self.mlp_branch, x)
        return x + self.mlp_branch(x)

    def attention_branch(self, x: Tensor, tables: RotaryTables, within: Within) -> Tensor:
        return self.self_attn(x, self.input_layernorm, tables, within)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.post_attention_layernorm)


def _recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    # Nothing in the model draws random numbers, so there is no generator state to restore.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
