"""A LLaMA decoder and its variations, with the parameter names and numbers of Hugging Face's classes."""

import torch
from torch import Tensor, nn

from rsotrain.config.schema import ActivationCheckpointing, ModelConfig
from rsotrain.models.functional import embedding, rotary_tables
from rsotrain.models.layers import Linear, RMSNorm
from rsotrain.models.loss import linear_cross_entropy
from rsotrain.models.parts import build_block
from rsotrain.models.rope import rope_scaling


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
        self.head_dim = config.head_size
        self.rope_theta, self.rope_scaling = config.rope_theta, rope_scaling(config)
        # the constructor would draw weights, which on the meta device imports torch's compiler: two seconds
        empty = torch.empty(vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(
            build_block(config, activation_checkpointing) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = embedding(tokens, self.embed_tokens.weight).to(self.compute_dtype)
        tables = rotary_tables(
            tokens.shape[1], self.head_dim, self.rope_theta, tokens.device, self.rope_scaling
        )
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
    ``z_loss``: as of ``linear_cross_entropy``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        compute_dtype: torch.dtype,
        activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
        separator_id: int | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.z_loss = config, z_loss
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
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            z_loss=self.z_loss,
        )
