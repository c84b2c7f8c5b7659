"""config.json of a Hugging Face folder <-> the model's configuration. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from rsotrain.config.schema import ModelConfig
from rsotrain.errors import UserError

MODEL_TYPES = ("llama", "mistral")
SIZES = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "max_position_embeddings": int,
    "vocab_size": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "initializer_range": float,
}
OPTIONAL = {"rope_theta": 10000.0, "initializer_range": 0.02}  # as transformers fills them in


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
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object; give a Hugging Face folder")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{file} has rope parameters that are not an object")
    _refuse(file, "model_type", values.get("model_type"), MODEL_TYPES)
    _refuse(file, "hidden_act", values.get("hidden_act", "silu"), ("silu", "swish"))
    _refuse(file, "attention_bias", values.get("attention_bias", False), (False,))
    _refuse(file, "mlp_bias", values.get("mlp_bias", False), (False,))
    _refuse(file, "rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",))
    _refuse(file, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))
    window = values.get("sliding_window")
    if window is not None and window < values.get("max_position_embeddings", 0):
        _refuse(file, "sliding_window", window, (None,))
    given = OPTIONAL | {name: value for name, value in values.items() if value is not None}
    given["rope_theta"] = rope.get("rope_theta", given["rope_theta"])
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    sizes = {name: _number(file, name, given.get(name), kind) for name, kind in SIZES.items()}
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    _refuse(file, "head_dim", values.get("head_dim") or head_dim, (head_dim,))
    return ModelConfig(
        name="pretrained",
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        **sizes,
    )


def _refuse(file: Path, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = " or ".join(str(k) for k in known)
        raise UserError(f"{file} has {name}={value}, but only {choices} can be read here")


def _number(file: Path, name: str, value: object, kind: type[int] | type[float]) -> Any:
    known = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, known) or not value > 0:
        raise UserError(f"{file} has {name}={value}, but it must be a positive number")
    return kind(value)


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
