"""The model of a run."""

import torch

from rsotrain.config.choices import WeightRounding
from rsotrain.config.schema import Config
from rsotrain.data.tokenizer import Tokenizer
from rsotrain.models.build import build_model, model_vocab_size
from rsotrain.models.llama import Llama


def float32_gains(config: Config) -> bool:
    """Are the gains of norms float32 whatever the precision?"""
    return config.optimizer.weight_rounding is WeightRounding.stochastic


def model_without_memory(config: Config, tokenizer: Tokenizer) -> Llama:
    """The model of a run on the meta device."""
    return build_model(
        config.model,
        vocab_size=model_vocab_size(config.model, tokenizer.vocab_size),
        precision=config.precision,
        device=torch.device("meta"),
        seed=config.seed,
        activation_checkpointing=config.activation_checkpointing,
        separator_id=tokenizer.eos_id if config.data.document_mask else None,
        z_loss=config.z_loss,
        float32_gains=float32_gains(config),
    )
