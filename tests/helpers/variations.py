"""Every variation of the model, small, by name: what the parametrised tests of the model go through."""

import dataclasses
from typing import Any

import torch

from rsotrain.config.model import ModelConfig, RopeScalingConfig
from rsotrain.config.schema import Precision
from rsotrain.models.build import build_model
from rsotrain.models.llama import Llama
from rsotrain.models.parts import PARTS

VOCAB = 97
TINY = ModelConfig(
    name="test", hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 48)  # at base 500: one frequency kept, one between
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2},
    "heads that do not divide": {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3},
    "qkv_bias": {"qkv_bias": True, "num_key_value_heads": 2},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 4},
    "qk_norm": {"qk_norm": True, "head_dim": 16, "num_key_value_heads": 1},
    "qk_norm and biases": {"qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
    "rope linear": {"rope_scaling": RopeScalingConfig("linear", 2.5)},
    "rope llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "qkv_bias and llama3": {"qkv_bias": True, "rope_scaling": LLAMA3},
    # every part that can be named, alone
    **{
        f"{field}={name}": {field: name}
        for field, known in PARTS.items()
        for name in known
        if name != getattr(TINY, field)
    },
}
VARIATIONS = {name: dataclasses.replace(TINY, **changes) for name, changes in CHANGES.items()}


def random_model(config: ModelConfig, precision: Precision = Precision.fp32, **options: Any) -> Llama:
    """A model whose attention is not uniform, whose gains are not 1 and whose biases are not 0."""
    wide = dataclasses.replace(config, initializer_range=0.2)
    arguments = {"vocab_size": VOCAB, "device": torch.device("cpu"), "seed": 0} | options
    model = build_model(wide, precision=precision, **arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(".bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (3, 24), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    return tokens, targets
