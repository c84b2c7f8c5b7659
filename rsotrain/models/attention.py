"""Self-attention of a decoder layer."""

from torch import Tensor, nn

from rsotrain.config.schema import ModelConfig
from rsotrain.models.documents import Documents, attention
from rsotrain.models.functional import rotary
from rsotrain.models.layers import Linear, RMSNorm, apply_normed

RotaryTables = tuple[Tensor, Tensor]
Within = Tensor | Documents | None  # what a token attends to, as of ``attention``


class CausalAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, of ``norm(x)``.

    With biases on q, k and v as Qwen2's, on all four as LLaMA's ``attention_bias``, or none; with an RMSNorm
    over the features of each query's and key's head as Qwen3's, or without.
    """

    shared_inputs = (("q_proj", "k_proj", "v_proj"), ("o_proj",))  # linears, by the input they read

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        self.query_size = config.query_size
        self.grouped = config.kv_heads != config.num_attention_heads
        hidden, qkv_bias = config.hidden_size, config.attention_bias or config.qkv_bias
        self.q_proj = Linear(hidden, config.query_size, bias=qkv_bias)
        self.k_proj = Linear(hidden, config.kv_size, bias=qkv_bias)
        self.v_proj = Linear(hidden, config.kv_size, bias=qkv_bias)
        self.o_proj = Linear(config.query_size, hidden, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, norm: RMSNorm, tables: RotaryTables, within: Within) -> Tensor:
        query, key, value = (
            out.unflatten(-1, (-1, self.head_dim))
            for out in apply_normed(x, norm, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = attention(
            rotary(query, *tables), rotary(key, *tables), value, within, grouped=self.grouped
        )
        return self.o_proj(attended.flatten(-2))

    def flops_per_token(self, seq_len: int) -> int:
        """Of scores and values, forward and backward: half of 12·s·d, since a token sees those before it."""
        return 6 * seq_len * self.query_size
