"""The typed configuration: what the YAML files fill in and what the constructors receive.

Imports neither torch nor Hydra, so that ``rsotrain --help`` stays quick and every class of the
package can be built from a notebook. A number's range stands with its field (``ranges.py``); what one
setting demands of another is in the files ``rules*.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from rsotrain.config.data import (
    BenchmarkConfig,
    C4DataConfig,
    DataConfig,
    EmbeddedDataConfig,
    EvaluationConfig,
    ExportConfig,
    FilesDataConfig,
    GenerateConfig,
    HubDataConfig,
    HubTokenizerConfig,
    HuggingFaceTokenizerConfig,
    InstructionsDataConfig,
    SentencePieceTokenizerConfig,
    SyntheticDataConfig,
    TokenizerConfig,
    TrainedTokenizerConfig,
)
from rsotrain.config.later import later
from rsotrain.config.methods import OPTIMIZERS, OptimizerConfig
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, SMALL, number
from rsotrain.config.samplers import SAMPLERS, SamplerConfig
from rsotrain.config.schedules import SCHEDULES, LRSchedulerConfig
from rsotrain.config.text import file_path


class Mode(Enum):
    """plan: the memory of the training run, without running it. benchmark: the configured training step, on
    random tokens. evaluate, generate and export act on ``checkpoint.path``: its model and tokenizer, not
    those of the command line."""

    train = "train"
    plan = "plan"
    benchmark = "benchmark"
    evaluate = "evaluate"
    generate = "generate"
    export = "export"


class Precision(Enum):
    """bf16_mixed: fp32 weights, bf16 compute. bf16: weights in bf16 too. fp32: everything fp32."""

    bf16_mixed = "bf16_mixed"
    bf16 = "bf16"
    fp32 = "fp32"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ActivationCheckpointing(Enum):
    """What is recomputed in the backward pass instead of kept."""

    none = "none"
    mlp = "mlp"
    block = "block"


# --- model -------------------------------------------------------------------------------------


@dataclass
class RopeScalingConfig:
    """How rotary angles are scaled, as ``rope_scaling`` in Hugging Face's configurations.

    ``rope_type``: default (not at all), linear or llama3; ``rsotrain.models.rope`` has the list, and which of
    the other fields each of them reads.
    """

    rope_type: str = "default"
    factor: float | None = number(None, above=0, at_most=10**6)
    low_freq_factor: float | None = number(None, above=0, at_most=10**6)
    high_freq_factor: float | None = number(None, above=0, at_most=10**6)
    original_max_position_embeddings: int | None = number(None, above=0, at_most=10**8)


@dataclass
class ModelConfig:
    """A LLaMA decoder and its variations. Field names are those of Hugging Face's configurations.

    ``head_dim``: null: hidden_size / num_attention_heads. ``attention_bias``: on q, k, v and o;
    ``qkv_bias``: on q, k and v only, as Qwen2; ``mlp_bias``: on gate, up and down. ``qk_norm``: RMSNorm of
    each query and key before the rotary embedding, as Qwen3. ``block``, ``attention``, ``mlp``: names in
    ``rsotrain.models.parts``. ``init_from``: a Hugging Face folder whose weights to start from.
    ``pad_vocab_to_multiple_of``: rows without a token that round the vocabulary up, for the speed of the
    matrix products.
    """

    name: str = MISSING
    hidden_size: int = number(above=0, at_most=10**6)
    intermediate_size: int = number(above=0, at_most=SIZE)
    num_hidden_layers: int = number(above=0, at_most=10**4)
    num_attention_heads: int = number(above=0, at_most=10**5)
    num_key_value_heads: int | None = number(None, above=0, at_most=10**5)  # null: as many as attention heads
    head_dim: int | None = later(number(None, above=0, at_most=10**5))
    max_position_embeddings: int = number(1024, above=0, at_most=10**8)
    vocab_size: int | None = number(None, above=0, at_most=SIZE)  # null: the tokenizer's
    rope_theta: float = number(10000.0, above=0, at_most=FACTOR)
    rope_scaling: RopeScalingConfig = later(field(default_factory=RopeScalingConfig))
    rms_norm_eps: float = number(1e-6, at_least=SMALL, at_most=1)
    initializer_range: float = number(0.02, at_least=0, at_most=100)
    tie_word_embeddings: bool = False
    attention_bias: bool = later(False)
    qkv_bias: bool = later(False)
    mlp_bias: bool = later(False)
    qk_norm: bool = later(False)
    block: str = later("pre_norm")
    attention: str = later("causal")
    mlp: str = later("swiglu")
    pad_vocab_to_multiple_of: int | None = number(None, above=0, at_most=10**5)
    init_from: str | None = file_path(None)

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
FIELDS_OF_THE_RUN = ("name", "initializer_range", "pad_vocab_to_multiple_of", "init_from")


# --- the rest ----------------------------------------------------------------------------------


class Strategy(Enum):
    """single: one process. ddp: a whole copy on each rank. fsdp: one copy, sharded over all ranks.
    hsdp: sharded inside groups of ranks, replicated between them."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


@dataclass
class ParallelismConfig:
    """``world_size``: processes the run must have; null: as many as were started; of mode=plan, how many to
    plan for; null: one. ``shard_size``: hsdp's
    ranks that share one copy; null: those of one node. ``timeout_seconds``: how long a rank waits for the
    others in one collective before it gives them up."""

    strategy: Strategy = Strategy.single
    world_size: int | None = number(None, above=0, at_most=10**5)
    shard_size: int | None = number(None, above=0, at_most=10**5)
    timeout_seconds: float = number(300.0, at_least=1, at_most=10**6)


class LoadWhat(Enum):
    """all: weights, optimizer state and step. weights: the weights alone, for a new run from step 0."""

    all = "all"
    weights = "weights"


@dataclass
class CheckpointConfig:
    """``path``: a checkpoint, or a run's folder with some, that a run without own checkpoints begins from.
    ``load``: what is taken from it. mode=evaluate, generate and export act on ``path``, which may be a
    Hugging Face folder then; null: this run's newest."""

    path: str | None = file_path(None)
    load: LoadWhat = LoadWhat.all


class WandbMode(Enum):
    """auto: online when an API key is there, else offline. shared: online, and other processes may write to
    the same run, too."""

    auto = "auto"
    online = "online"
    offline = "offline"
    shared = "shared"
    disabled = "disabled"


class Progress(Enum):
    """auto: a live display in a terminal, plain lines otherwise."""

    auto = "auto"
    live = "live"
    plain = "plain"


@dataclass
class LoggerConfig:
    """``metrics.jsonl`` and ``train.log`` are always written; this adds Weights & Biases and a display.

    Of what is null W&B's own variables decide (``WANDB_PROJECT``, ``WANDB_MODE``, ``WANDB_RUN_GROUP``, …);
    without one the mode is auto, the project rsotrain, and the server has 30 seconds to answer."""

    name: str = MISSING
    wandb: bool = False
    wandb_mode: WandbMode | None = None
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] | None = None
    wandb_init_timeout_seconds: float | None = number(None, above=0, at_most=10**5)
    progress: Progress = Progress.auto


@dataclass
class ReportConfig:
    """What a multirun of trainings leaves beside its table on the screen, like ``rsotrain-report``.

    ``path``: the folder for page, tables and pictures; null: none. ``claims``: hold the papers' claims
    against the runs, too. It is about all runs in the folder of the multirun's own. A run that is not started
    by a multirun writes none.
    """

    path: str | None = file_path(None)
    claims: bool = False


@dataclass
class Config:
    """One run. Sizes are in sequences, tokens, optimizer steps, seconds or bytes, as the names say.

    The groups' defaults are the base classes: Hydra lets a file replace a schema by a subclass only.
    """

    mode: Mode = Mode.train
    steps: int = number(above=0, at_most=COUNT)
    batch_size: int = number(above=0, at_most=10**6)  # sequences per optimizer step, all ranks
    micro_batch_size: int | None = number(None, above=0, at_most=10**6)  # per pass and rank; null: all
    seq_len: int = number(above=0, at_most=10**8)
    seed: int = number(0, at_least=0, at_most=COUNT)
    device: Device = Device.auto
    precision: Precision = Precision.bf16_mixed
    grad_clip: float | None = number(None, above=0, at_most=FACTOR)  # global norm of gradients; null: none
    compile: bool = False
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    eval_every: int | None = number(None, above=0, at_most=COUNT)  # steps; null: only at the end
    save_every: int | None = number(None, above=0, at_most=COUNT)  # steps; null: only at the end
    log_every: int = number(10, above=0, at_most=COUNT)  # steps
    keep_checkpoints: int = number(2, above=0, at_most=COUNT)  # newest checkpoints kept
    max_seconds: float | None = number(None, above=0, at_most=FACTOR)
    run_name: str | None = None  # null: made from the settings
    output_dir: str = file_path("outputs")
    cache_dir: str | None = file_path(None)  # null: $RSOTRAIN_CACHE_DIR or ~/.cache/rsotrain
    overwrite: bool = False

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


# Group -> the schema that each file of conf/<group>/ names in its defaults list.
SCHEMAS: dict[str, Mapping[str, type]] = {
    "model": {"llama": ModelConfig},
    "optimizer": OPTIMIZERS,
    "sampler": SAMPLERS,
    "data": {
        "c4": C4DataConfig,
        "embedded": EmbeddedDataConfig,
        "files": FilesDataConfig,
        "hub": HubDataConfig,
        "instructions": InstructionsDataConfig,
        "synthetic": SyntheticDataConfig,
    },
    "tokenizer": {
        "hub": HubTokenizerConfig,
        "huggingface": HuggingFaceTokenizerConfig,
        "sentencepiece": SentencePieceTokenizerConfig,
        "trained": TrainedTokenizerConfig,
    },
    "lr_scheduler": SCHEDULES,
    "parallelism": {"parallelism": ParallelismConfig},
    "logger": {"logger": LoggerConfig},
}
