"""config.json of a Hugging Face folder <-> the model's configuration. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from rsotrain.config import ModelConfig
from rsotrain.errors import UserError

MODEL_TYPES = ("llama", "mistral")
SIZES = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "max_position_embeddings": int,
    "vocab_size": int,
    "rms_norm_eps": float,
}


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in a folder, its vocabulary size included.

    Raises UserError where there is none, and for an architecture that is not this package's LLaMA.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give a Hugging Face folder") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    _refuse(file, "model_type", values.get("model_type"), MODEL_TYPES)
    _refuse(file, "hidden_act", values.get("hidden_act", "silu"), ("silu", "swish"))
    _refuse(file, "attention_bias", values.get("attention_bias", False), (False,))
    _refuse(file, "mlp_bias", values.get("mlp_bias", False), (False,))
    _refuse(file, "rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",))
    _refuse(file, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))
    window = values.get("sliding_window")
    if window is not None and window < values.get("max_position_embeddings", 0):
        _refuse(file, "sliding_window", window, (None,))
    try:
        sizes: dict[str, Any] = {name: kind(values[name]) for name, kind in SIZES.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} has no usable {error}") from error
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    _refuse(file, "head_dim", values.get("head_dim") or head_dim, (head_dim,))
    return ModelConfig(
        name="pretrained",
        num_key_value_heads=values.get("num_key_value_heads"),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        initializer_range=float(values.get("initializer_range", 0.02)),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        **sizes,
    )


def _refuse(file: Path, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = " or ".join(str(k) for k in known)
        raise UserError(f"{file} has {name}={value}, but only {choices} can be read here")


def write_config(
    folder: Path, config: ModelConfig, *, vocab_size: int, dtype: str, eos_id: int, bos_id: int | None
) -> None:
    """Write the config.json from which ``transformers`` builds a LlamaForCausalLM."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
