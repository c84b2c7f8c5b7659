"""config.json of a Hugging Face folder <-> the model's configuration."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsotrain.config.keys import flatten, plain
from rsotrain.config.model import FIELDS_OF_THE_RUN, ModelConfig, RopeScalingConfig
from rsotrain.config.validation import validate_model
from rsotrain.errors import UserError
from rsotrain.files import read_json
from rsotrain.models.rope import ROPE_TYPES, rope_fields, rope_scaling


@dataclass(frozen=True)
class Family:
    """A class of transformers.

    ``always``: what its models have whatever their config.json says; ``told``: the variations that
    config.json tells; none of its models has any other, scaled rotary frequencies excepted. ``absent``: what
    a key stands for that config.json lacks. ``splits``: its configuration refuses a hidden_size that its
    heads do not divide, be head_dim given or not.
    """

    model_type: str
    architecture: str
    told: tuple[str, ...] = ()
    always: Mapping[str, object] = field(default_factory=dict)
    absent: Mapping[str, object] = field(default_factory=dict)
    splits: bool = False


_QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# In the order in which an export prefers them.
FAMILIES = (
    Family(
        "llama", "LlamaForCausalLM", ("head_dim", "attention_bias", "mlp_bias"),
        absent={"num_key_value_heads": None}, splits=True,
    ),
    Family(
        "mistral", "MistralForCausalLM", ("head_dim",),
        absent={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family("qwen2", "Qwen2ForCausalLM", ("head_dim",), {"qkv_bias": True}, _QWEN),
    Family(
        "qwen3", "Qwen3ForCausalLM", ("head_dim", "attention_bias"), {"qk_norm": True},
        _QWEN | {"head_dim": 128},
    ),
)  # fmt: skip
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
_ALL_HAVE = {*SIZES, *FIELDS_OF_THE_RUN, "tie_word_embeddings", "rope_scaling"}


# --- reading -------------------------------------------------------------------------------------


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in a folder, its vocabulary size included.

    A sliding window is no part of it: no more positions are allowed than it spans, and for so many it is
    full attention. Raises UserError where there is no configuration that can be read, and for an
    architecture that is not among ``FAMILIES``.
    """
    return _read(folder)[0]


def read_window(folder: Path) -> int | None:
    """Of how many tokens attention sees the last ones only; None where it is full. Raises as read_config."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[ModelConfig, int | None]:
    file = folder / "config.json"
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object; give a Hugging Face folder")
    try:
        reader = _Reader(values)
        config = reader.config()
        validate_model(config)
        rope_scaling(config)
        return config, reader.window()
    except UserError as error:
        sentence = str(error).replace("model.", "")  # the file's own keys are meant
        raise UserError(f"{file}: {sentence}") from error


class _Reader:
    """Raises UserError without the file's name."""

    def __init__(self, values: dict[str, Any]) -> None:
        kinds = {family.model_type: family for family in FAMILIES}
        self.choose("model_type", values.get("model_type"), tuple(kinds))
        self.family = kinds[values["model_type"]]
        self.values: dict[str, Any] = {**self.family.absent, **values}

    def config(self) -> ModelConfig:
        values, family = self.values, self.family
        self.choose("hidden_act", values.get("hidden_act", "silu"), ("silu", "swish"))
        if values.get("quantization_config") is not None:
            raise UserError("its weights are quantised; give the folder of the model that is not")
        given = OPTIONAL | {name: value for name, value in values.items() if value is not None}
        rope = self.rope()
        given["rope_theta"] = given["rope_theta"] if rope.get("rope_theta") is None else rope["rope_theta"]
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        sizes = {name: _number(name, given.get(name), kind) for name, kind in SIZES.items()}
        window = self.window()
        if window is not None:
            sizes["max_position_embeddings"] = min(sizes["max_position_embeddings"], window)
        variations = {name: self.told(name) for name in family.told} | dict(family.always)
        head_dim = variations.get("head_dim")
        if head_dim is not None and head_dim * sizes["num_attention_heads"] == sizes["hidden_size"]:
            variations["head_dim"] = None
        return ModelConfig(
            name="pretrained",
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            rope_scaling=self.scaling(rope, sizes["max_position_embeddings"]),
            **sizes,
            **variations,
        )

    def told(self, name: str) -> Any:
        if name != "head_dim":
            return self.flag(name)
        value = self.values.get(name)
        return None if value is None else _number(name, value, int)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"it has {name}={_short(value)}, but it must be true or false")
        return bool(value)

    def rope(self) -> dict[str, Any]:
        rope = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise UserError("it has rope parameters that are not an object")
        factor = rope.get("partial_rotary_factor", self.values.get("partial_rotary_factor"))
        self.choose("partial_rotary_factor", 1.0 if factor is None else factor, (1.0,))
        return rope

    def scaling(self, rope: dict[str, Any], positions: int) -> RopeScalingConfig:
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        self.choose("rope_type", rope_type, tuple(ROPE_TYPES))
        given = dict(rope)
        context = "original_max_position_embeddings"
        # transformers takes the one beside the parameters first, and the model's own where there is none
        given[context] = self.values.get(context) or rope.get(context) or positions
        kinds = {name: int if name == context else float for name in rope_fields(rope_type)}
        return RopeScalingConfig(
            rope_type, **{name: _number(name, given.get(name), kind) for name, kind in kinds.items()}
        )

    def window(self) -> int | None:
        """Positions that attention spans where it is not full in every layer."""
        window = self.values.get("sliding_window")
        if window is None or ("use_sliding_window" in self.family.absent and not self._slides()):
            return None
        return _number("sliding_window", window, int)

    def _slides(self) -> bool:
        """Whether a layer of a Qwen does."""
        if not self.flag("use_sliding_window"):
            return False
        layers = self.values.get("layer_types")
        if layers is None:
            first = self.values["max_window_layers"]
            return not isinstance(first, int) or first < self.values["num_hidden_layers"]
        if not isinstance(layers, list):
            raise UserError(f"it has layer_types={_short(layers)}, but it must be a list of names")
        for layer in layers:
            self.choose("layer_types", layer, ("full_attention", "sliding_attention"))
        return "sliding_attention" in layers

    def choose(self, name: str, value: object, known: tuple[object, ...]) -> None:
        if not isinstance(value, str | int | float) or value not in known:
            choices = " or ".join(str(k) for k in known)
            raise UserError(f"it has {name}={_short(value)}, but only {choices} can be read here")


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def _number(name: str, value: object, kind: type[int] | type[float]) -> Any:
    """A positive number; what is too large a one is for the model's ranges to say."""
    known = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, known) or not 0 < value < math.inf:
        raise UserError(f"it has {name}={_short(value)}, but it must be a positive number")
    try:
        return kind(value)
    except OverflowError as error:
        raise UserError(f"it has {name}={_short(value)}, which is too large") from error


# --- writing -------------------------------------------------------------------------------------


def family_of(config: ModelConfig) -> Family:
    """The class of transformers that is the same model. Raises UserError where there is none."""
    default = ModelConfig()
    variations = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(ModelConfig)
        if f.name not in _ALL_HAVE and getattr(config, f.name) != getattr(default, f.name)
    }
    splits = config.hidden_size % config.num_attention_heads == 0
    for family in FAMILIES:
        kept = variations.keys() - family.told
        if {name: variations[name] for name in kept} == dict(family.always) and (splits or not family.splits):
            return family
    named = dict(flatten({"model": plain(variations)}))
    found = " and ".join(f"{key}={str(value).lower()}" for key, value in named.items())
    classes = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(
        f"a model with {found} cannot be exported: none of transformers' {classes} is the same model"
    )


def write_config(
    folder: Path, config: ModelConfig, *, vocab_size: int, dtype: str, eos_id: int, bos_id: int | None
) -> None:
    """Write the config.json from which ``transformers`` builds the class of ``family_of``."""
    family = family_of(config)
    scaling = {name: value for name, value in plain(config.rope_scaling).items() if value is not None}
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "sliding_window": None,
        **{name: getattr(config, name) for name in family.told},
        "head_dim": config.head_size,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
    if config.rope_scaling != RopeScalingConfig():
        values["rope_scaling"] = scaling  # as transformers wrote it before version 5
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
