"""A LLaMA decoder whose parameter names and numbers equal Hugging Face's LlamaForCausalLM."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsotrain.config.schema import ActivationCheckpointing, ModelConfig
from rsotrain.models.functional import (
    normed_linear,
    rms_norm,
    rotary,
    rotary_tables,
    shared_input_linear,
    swiglu_linear,
)
from rsotrain.models.loss import linear_cross_entropy

RotaryTables = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """RMSNorm that keeps only its input for the backward pass."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """x Wᵀ without bias, in x's dtype whatever the weight's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return shared_input_linear(x, self.weight)[0]

    @staticmethod
    def apply_shared(layers: Sequence["Linear"], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of several linears that read the same input, which is kept once."""
        return shared_input_linear(x, *(layer.weight for layer in layers))

    @staticmethod
    def apply_normed(layers: Sequence["Linear"], x: Tensor, norm: RMSNorm) -> tuple[Tensor, ...]:
        """``apply_shared`` of norm(x), whose output is not kept."""
        return normed_linear(x, norm.weight, norm.eps, *(layer.weight for layer in layers))

    def apply_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of silu(gate) · up, which is not kept."""
        return swiglu_linear(gate, up, self.weight)


def apply_normed(x: Tensor, norm: RMSNorm, *layers: Linear) -> tuple[Tensor, ...]:
    """``apply_shared(norm(x), …)``, through the class of the layers where they are of one."""
    kind = type(layers[0])
    if all(type(layer) is kind for layer in layers):
        return kind.apply_normed(layers, x, norm)
    return apply_shared(norm(x), *layers)


def apply_shared(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """``layer(x)`` for each, through their class's way to share what they keep of x."""
    kind = type(layers[0])
    same = [layer for layer in layers if type(layer) is kind]
    if len(same) == len(layers):
        return kind.apply_shared(layers, x)
    others = [layer for layer in layers if type(layer) is not kind]
    outputs = dict(zip(same, kind.apply_shared(same, x), strict=True))
    outputs |= zip(others, apply_shared(x, *others), strict=True)
    return tuple(outputs[layer] for layer in layers)


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, of ``norm(x)``."""

    shared_inputs = (("q_proj", "k_proj", "v_proj"), ("o_proj",))  # linears, by the input they read

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.grouped = config.kv_heads != config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.kv_size)
        self.v_proj = Linear(config.hidden_size, config.kv_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, norm: RMSNorm, tables: RotaryTables, mask: Tensor | None) -> Tensor:
        query, key, value = (
            out.unflatten(-1, (-1, self.head_dim))
            for out in apply_normed(x, norm, self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(
            rotary(query, *tables).transpose(1, 2),
            rotary(key, *tables).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(silu(gate(y)) · up(y)) of y = ``norm(x)``."""

    shared_inputs = (("gate_proj", "up_proj"), ("down_proj",))

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = apply_normed(x, norm, self.gate_proj, self.up_proj)
        return self.down_proj.apply_swiglu(gate, up)


class Block(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, activation_checkpointing: ActivationCheckpointing) -> None:
        super().__init__()
        # Registered in Hugging Face's order, which optimizer states are listed in.
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor, tables: RotaryTables, mask: Tensor | None = None) -> Tensor:
        if self.activation_checkpointing is ActivationCheckpointing.block:
            return _recomputed(self._layer, x, tables, mask)
        return self._layer(x, tables, mask)

    def _layer(self, x: Tensor, tables: RotaryTables, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(x, self.input_layernorm, tables, mask)
        if self.activation_checkpointing is ActivationCheckpointing.mlp:
            return x + _recomputed(self._mlp, x)
        return x + self._mlp(x)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.post_attention_layernorm)


def _recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    # Nothing in the model draws random numbers, so there is no generator state to restore.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def document_mask(tokens: Tensor, separator_id: int) -> Tensor:
    """Which tokens each token attends to: those before it in its document, and itself.

    A separator begins a document. tokens: (batch, seq_len). Returns bool (batch, 1, seq_len, seq_len).
    """
    documents = (tokens == separator_id).cumsum(1)
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)


class LlamaModel(nn.Module):
    """The trunk: tokens (batch, seq_len) -> normalised hidden states (batch, seq_len, hidden_size)."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        compute_dtype: torch.dtype,
        activation_checkpointing: ActivationCheckpointing,
        separator_id: int | None,
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.separator_id = separator_id
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta
        # the constructor would draw weights, which on the meta device imports torch's compiler: two seconds
        empty = torch.empty(vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, activation_checkpointing) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        tables = rotary_tables(tokens.shape[1], self.head_dim, self.rope_theta, tokens.device)
        mask = None if self.separator_id is None else document_mask(tokens, self.separator_id)
        for layer in self.layers:
            x = layer(x, tables, mask)
        return self.norm(x)


class Llama(nn.Module):
    """LLaMA with its LM head.

    ``forward(tokens)`` gives the logits (batch, seq_len, vocab_size) in the compute dtype;
    ``forward(tokens, targets)`` gives the sum of the cross-entropy over the targets (batch, seq_len) that
    are not −100, an fp32 scalar: position i is scored against ``targets[:, i]``, so targets are the
    tokens moved left by one. The caller divides by the number of scored tokens of the whole batch.
    ``device_kind``: as of ``linear_cross_entropy``; a plan for a GPU is made with tensors on the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        compute_dtype: torch.dtype,
        activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
        separator_id: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.device_kind: str | None = None
        self.model = LlamaModel(config, vocab_size, compute_dtype, activation_checkpointing, separator_id)
        self.lm_head = Linear(config.hidden_size, vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding again where the configuration ties them (after ``to_empty``)."""
        if self.config.tie_word_embeddings:
            embedding = self.model.embed_tokens.weight
            assert isinstance(embedding, nn.Parameter)
            self.lm_head.weight = embedding

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        hidden = self.model(tokens)
        if targets is None:
            return self.lm_head(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.device_kind
        )
