"""The settings of a model; part of ``schema.py``, which names them all."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from rsotrain.config.later import later
from rsotrain.config.meanings import means
from rsotrain.config.ranges import FACTOR, SIZE, SMALL, number
from rsotrain.config.text import file_path


@dataclass
class RopeScalingConfig:
    """How rotary angles are scaled, as ``rope_scaling`` in Hugging Face's configurations.

    ``rsotrain.models.rope`` says which fields each type reads.
    """

    rope_type: str = means("default (no scaling), linear or llama3", "default")
    factor: float | None = means(
        "by which longer sequences are scaled (linear, llama3)", number(None, above=0, at_most=10**6)
    )
    low_freq_factor: float | None = means(
        "below original_max_position_embeddings over this the angles are scaled (llama3)",
        number(None, above=0, at_most=10**6),
    )
    high_freq_factor: float | None = means(
        "above it they are left as they are (llama3)", number(None, above=0, at_most=10**6)
    )
    original_max_position_embeddings: int | None = means(
        "longest sequence of the model before scaling (llama3)",
        number(None, above=0, at_most=10**8),
        unit="tokens",
    )


@dataclass
class ModelConfig:
    """A LLaMA decoder and its variations. Field names are those of Hugging Face's configurations."""

    name: str = means("name of the size, as it stands in the run's name", MISSING)
    hidden_size: int = means("width of the residual stream", number(above=0, at_most=10**6), unit="features")
    intermediate_size: int = means("width of the MLP", number(above=0, at_most=SIZE), unit="features")
    num_hidden_layers: int = means("decoder layers", number(above=0, at_most=10**4), unit="layers")
    num_attention_heads: int = means("heads of the queries", number(above=0, at_most=10**5), unit="heads")
    num_key_value_heads: int | None = means(
        "heads of keys and values; null: as many as of the queries",
        number(None, above=0, at_most=10**5),
        unit="heads",
    )
    head_dim: int | None = means(
        "size of a head; null: hidden_size / num_attention_heads",
        later(number(None, above=0, at_most=10**5)),
        unit="features",
    )
    max_position_embeddings: int = means(
        "longest sequence", number(1024, above=0, at_most=10**8), unit="tokens"
    )
    vocab_size: int | None = means(
        "rows of embedding and head; null: the tokenizer's",
        number(None, above=0, at_most=SIZE),
        unit="tokens",
    )
    rope_theta: float = means("base of the rotary angles", number(10000.0, above=0, at_most=FACTOR))
    rope_scaling: RopeScalingConfig = later(field(default_factory=RopeScalingConfig))
    rms_norm_eps: float = means(
        "added to the mean square in RMSNorm", number(1e-6, at_least=SMALL, at_most=1)
    )
    initializer_range: float = means(
        "standard deviation of the initial weights", number(0.02, at_least=0, at_most=100)
    )
    tie_word_embeddings: bool = means("one matrix for embedding and head", False)
    attention_bias: bool = means("biases of q, k, v and o", later(False))
    qkv_bias: bool = means("biases of q, k and v only, as Qwen2 has them", later(False))
    mlp_bias: bool = means("biases of gate, up and down", later(False))
    qk_norm: bool = means(
        "RMSNorm of each query and key before the rotary embedding, as Qwen3 has it", later(False)
    )
    block: str = means("the decoder block, a name in rsotrain.models.parts", later("pre_norm"))
    attention: str = means("the attention, a name in rsotrain.models.parts", later("causal"))
    mlp: str = means("the MLP, a name in rsotrain.models.parts", later("swiglu"))
    pad_vocab_to_multiple_of: int | None = means(
        "round the vocabulary up by rows without a token, for the speed of the head; null: do not",
        number(None, above=0, at_most=10**5),
        unit="tokens",
    )
    init_from: str | None = means(
        "Hugging Face folder whose weights to start from; null: random weights", file_path(None)
    )
    freeze: list[str] = means(
        "regular expressions that find the names of parameters that are not trained",
        later(field(default_factory=list)),
    )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Rows of q_proj, and columns of o_proj."""
        return self.head_size * self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.head_size * self.kv_heads


# Fields of ModelConfig that a Hugging Face folder does not tell; model=pretrained takes all others from it.
FIELDS_OF_THE_RUN = ("name", "initializer_range", "pad_vocab_to_multiple_of", "init_from", "freeze")
