"""A LLaMA decoder and its variations, with the parameter names and numbers of Hugging Face's classes."""

import torch
from torch import Tensor, nn

from rsotrain.config.schema import ActivationCheckpointing, ModelConfig
from rsotrain.models.attention import Within
from rsotrain.models.documents import Documents, document_mask, documents_of, takes_documents
from rsotrain.models.functional import embedding, rotary_tables
from rsotrain.models.layers import Linear, RMSNorm
from rsotrain.models.loss import linear_cross_entropy
from rsotrain.models.parts import build_block
from rsotrain.models.rope import rope_scaling


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

    def takes_documents(self, device: torch.device) -> bool:
        """Does attention stay inside documents, by their beginnings?"""
        return self.separator_id is not None and takes_documents(device, self.compute_dtype, self.head_dim)

    def documents(self, tokens: Tensor, device: torch.device) -> Documents | None:
        """To be given to ``forward`` with the tokens, on ``device``; None where it does not take them.

        Of tokens on the host they need no wait.
        """
        if self.separator_id is None or not self.takes_documents(device):
            return None
        return documents_of(tokens, self.separator_id, device)

    def _within(self, tokens: Tensor, documents: Documents | None) -> Within:
        if self.separator_id is None or documents is not None:
            return documents
        found = self.documents(tokens, tokens.device)
        return document_mask(tokens, self.separator_id) if found is None else found

    def forward(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        x = embedding(tokens, self.embed_tokens.weight).to(self.compute_dtype)
        tables = rotary_tables(
            tokens.shape[1], self.head_dim, self.rope_theta, tokens.device, self.rope_scaling
        )
        within = self._within(tokens, documents)
        for layer in self.layers:
            x = layer(x, tables, within)
        return self.norm(x)


class Llama(nn.Module):
    """LLaMA with its LM head.

    ``forward(tokens)`` gives the logits (batch, seq_len, vocab_size) in the compute dtype;
    ``forward(tokens, targets)`` gives the sum of the cross-entropy over the targets (batch, seq_len) that
    are not −100, an fp32 scalar: position i is scored against ``targets[:, i]``, so targets are the
    tokens moved left by one. The caller divides by the number of scored tokens of the whole batch.
    ``z_loss``: as of ``linear_cross_entropy``. ``documents``: those of ``model.documents``, of tokens on the
    host; without them a model that has a separator finds them itself.
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

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, documents: Documents | None = None
    ) -> Tensor:
        hidden = self.model(tokens, documents)
        if targets is None:
            return self.lm_head(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            z_loss=self.z_loss,
        )
