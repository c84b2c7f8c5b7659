"""The typed configuration: what the YAML files fill in and what the constructors receive.

Imports neither torch nor Hydra, so that ``rsotrain --help`` stays quick and every class of the
package can be built from a notebook. Ranges and cross-field rules are in ``validation.py``.
"""

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
from rsotrain.config.methods import (
    AdamConfig,
    ApolloConfig,
    CoordinateConfig,
    FiraConfig,
    FrugalConfig,
    GaLoreConfig,
    GaussianConfig,
    GoLoreConfig,
    HaarConfig,
    ImportanceConfig,
    LDAdamConfig,
    MixtureConfig,
    MuonConfig,
    NoSamplerConfig,
    OnlinePCAConfig,
    OptimizerConfig,
    RandomizedSvdConfig,
    RSOConfig,
    SamplerConfig,
    SNConfig,
    SNSMConfig,
    SRHTConfig,
    SvdConfig,
    TopkNormConfig,
)


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
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


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
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int | None = None  # null: as many as attention heads
    head_dim: int | None = later(None)
    max_position_embeddings: int = 1024
    vocab_size: int | None = None  # null: the tokenizer's
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = later(field(default_factory=RopeScalingConfig))  # noqa: RUF009
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = later(False)
    qkv_bias: bool = later(False)
    mlp_bias: bool = later(False)
    qk_norm: bool = later(False)
    block: str = later("pre_norm")
    attention: str = later("causal")
    mlp: str = later("swiglu")
    pad_vocab_to_multiple_of: int | None = None
    init_from: str | None = None

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


@dataclass
class LRSchedulerConfig:
    """Linear warm-up over ``warmup_steps``, or over ``warmup_fraction`` of the steps when that is null."""

    name: str = MISSING
    warmup_fraction: float = 0.1
    warmup_steps: int | None = None


@dataclass
class ConstantConfig(LRSchedulerConfig):
    """The peak rate to the end."""


@dataclass
class CosineConfig(LRSchedulerConfig):
    """A half cosine down to ``min_ratio`` of the peak at the last step."""

    min_ratio: float = 0.1


@dataclass
class LinearConfig(LRSchedulerConfig):
    """A straight line down to ``min_ratio`` of the peak at the last step."""

    min_ratio: float = 0.0


@dataclass
class WSDConfig(LRSchedulerConfig):
    """Warm-up, stable, then a straight line down to ``min_ratio`` over the last ``decay_fraction``."""

    decay_fraction: float = 0.2
    min_ratio: float = 0.0


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
    world_size: int | None = None
    shard_size: int | None = None
    timeout_seconds: float = 300.0


class LoadWhat(Enum):
    """all: weights, optimizer state and step. weights: the weights alone, for a new run from step 0."""

    all = "all"
    weights = "weights"


@dataclass
class CheckpointConfig:
    """``path``: a checkpoint, or a run's folder with some, that a run without own checkpoints begins from.
    ``load``: what is taken from it. mode=evaluate, generate and export act on ``path``, which may be a
    Hugging Face folder then; null: this run's newest."""

    path: str | None = None
    load: LoadWhat = LoadWhat.all


class WandbMode(Enum):
    """auto: online when an API key is there, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"


class Progress(Enum):
    """auto: a live display in a terminal, plain lines otherwise."""

    auto = "auto"
    live = "live"
    plain = "plain"


@dataclass
class LoggerConfig:
    """``metrics.jsonl`` and ``train.log`` are always written; this adds Weights & Biases and a display."""

    name: str = MISSING
    wandb: bool = False
    wandb_mode: WandbMode = WandbMode.auto
    wandb_project: str = "rsotrain"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    wandb_init_timeout_seconds: float = 30.0
    progress: Progress = Progress.auto


@dataclass
class ReportConfig:
    """What a multirun of trainings leaves beside its table on the screen, like ``rsotrain-report``.

    ``path``: the folder for page, tables and pictures; null: none. ``claims``: hold the papers' claims
    against the runs, too. It is about all runs in the folder of the multirun's own. A run that is not started
    by a multirun writes none.
    """

    path: str | None = None
    claims: bool = False


@dataclass
class Config:
    """One run. Sizes are in sequences, tokens, optimizer steps, seconds or bytes, as the names say.

    The groups' defaults are the base classes: Hydra lets a file replace a schema by a subclass only.
    """

    mode: Mode = Mode.train
    steps: int = MISSING
    batch_size: int = MISSING  # sequences per optimizer step, all ranks
    micro_batch_size: int | None = None  # sequences per forward pass and rank; null: all
    seq_len: int = MISSING
    seed: int = 0
    device: Device = Device.auto
    precision: Precision = Precision.bf16_mixed
    grad_clip: float | None = None  # largest global gradient norm; null: no clipping
    compile: bool = False
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    eval_every: int | None = None  # steps; null: only at the end
    save_every: int | None = None  # steps; null: only at the end
    log_every: int = 10  # steps
    keep_checkpoints: int = 2  # newest checkpoints kept
    max_seconds: float | None = None
    run_name: str | None = None  # null: made from the settings
    output_dir: str = "outputs"
    cache_dir: str | None = None  # null: $RSOTRAIN_CACHE_DIR or ~/.cache/rsotrain
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
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"llama": ModelConfig},
    "optimizer": {
        "adam": AdamConfig,
        "apollo": ApolloConfig,
        "fira": FiraConfig,
        "frugal": FrugalConfig,
        "galore": GaLoreConfig,
        "ldadam": LDAdamConfig,
        "muon": MuonConfig,
        "rso": RSOConfig,
        "sn": SNConfig,
        "sn_sm": SNSMConfig,
    },
    "sampler": {
        "none": NoSamplerConfig,
        "coordinate": CoordinateConfig,
        "gaussian": GaussianConfig,
        "golore": GoLoreConfig,
        "haar": HaarConfig,
        "importance": ImportanceConfig,
        "mixture": MixtureConfig,
        "online_pca": OnlinePCAConfig,
        "randomized_svd": RandomizedSvdConfig,
        "srht": SRHTConfig,
        "svd": SvdConfig,
        "topk_norm": TopkNormConfig,
    },
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
    "lr_scheduler": {
        "constant": ConstantConfig,
        "cosine": CosineConfig,
        "linear": LinearConfig,
        "wsd": WSDConfig,
    },
    "parallelism": {"parallelism": ParallelismConfig},
    "logger": {"logger": LoggerConfig},
}
