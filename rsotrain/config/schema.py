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
    TuneConfig,
)
from rsotrain.config.later import later
from rsotrain.config.meanings import means
from rsotrain.config.methods import OPTIMIZERS, OptimizerConfig
from rsotrain.config.model import ModelConfig
from rsotrain.config.ranges import COUNT, FACTOR, number
from rsotrain.config.samplers import SAMPLERS, SamplerConfig
from rsotrain.config.schedules import SCHEDULES, LRSchedulerConfig
from rsotrain.config.text import file_path


class Mode(Enum):
    """plan: the memory of the training run, without running it. benchmark: the configured training step, on
    random tokens. tune: training runs with several values of ``tune.key``, until the best has worse ones on
    both sides. evaluate, generate and export act on ``checkpoint.path``: its model and tokenizer, not
    those of the command line."""

    train = "train"
    plan = "plan"
    benchmark = "benchmark"
    tune = "tune"
    evaluate = "evaluate"
    generate = "generate"
    export = "export"


class Precision(Enum):
    """auto: bf16_mixed, but fp32 on a CPU without bf16 products. bf16_mixed: fp32 weights, bf16 compute.
    bf16: weights in bf16 too. fp32: everything fp32."""

    auto = "auto"
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


class Strategy(Enum):
    """single: one process. ddp: a whole copy on each rank. fsdp: one copy, sharded over all ranks.
    hsdp: sharded inside groups of ranks, replicated between them."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


@dataclass
class ParallelismConfig:
    """How a run is divided among processes."""

    strategy: Strategy = means("how the processes divide the work", Strategy.single)
    world_size: int | None = means(
        "processes that there must be, or that mode=plan plans for; null: those that were started, or one",
        number(None, above=0, at_most=10**5),
        unit="processes",
    )
    shard_size: int | None = means(
        "processes that share one copy with hsdp; null: those of a node",
        number(None, above=0, at_most=10**5),
        unit="processes",
    )
    timeout_seconds: float = means(
        "how long a process waits for the others in one collective before it gives them up",
        number(300.0, at_least=1, at_most=10**6),
        unit="seconds",
    )


class LoadWhat(Enum):
    """all: weights, optimizer state and step. weights: the weights alone, for a new run from step 0."""

    all = "all"
    weights = "weights"


@dataclass
class CheckpointConfig:
    """What a run begins from that has no checkpoints of its own, and what the other modes act on."""

    path: str | None = means(
        "run or checkpoint to begin from or act on (not training: or Hugging Face folder); null: this run's",
        file_path(None),
    )
    load: LoadWhat = means("what a training takes from it", LoadWhat.all)


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

    Of what is null W&B's own variables decide."""

    name: str = means("name of the option", MISSING)
    wandb: bool = means(
        "log to Weights & Biases, beside metrics.jsonl and train.log, which are always written", False
    )
    wandb_mode: WandbMode | None = means("null: $WANDB_MODE, or auto", None)
    wandb_project: str | None = means("project of Weights & Biases; null: $WANDB_PROJECT, or rsotrain", None)
    wandb_entity: str | None = means("user or team; null: $WANDB_ENTITY, or your own", None)
    wandb_group: str | None = means("group of the run; null: $WANDB_RUN_GROUP, or none", None)
    wandb_tags: list[str] | None = means("tags of the run; null: $WANDB_TAGS, or none", None)
    wandb_init_timeout_seconds: float | None = means(
        "how long the server has to answer at the start; null: $WANDB_INIT_TIMEOUT, or 30",
        number(None, above=0, at_most=10**5),
        unit="seconds",
    )
    progress: Progress = means("what a run shows on the screen", Progress.auto)


@dataclass
class ReportConfig:
    """What a multirun of trainings leaves beside its table on the screen, like ``rsotrain-report``.

    It is about all runs in the folder of the multirun's own. A run that is not started by a multirun writes
    none.
    """

    path: str | None = means(
        "folder for the report of a multirun: page, tables and pictures; null: none", file_path(None)
    )
    claims: bool = means("hold the papers' claims against the runs in that report", False)


@dataclass
class Config:
    """One run. Sizes are in sequences, tokens, optimizer steps, seconds or bytes, as the names say.

    The groups' defaults are the base classes: Hydra lets a file replace a schema by a subclass only.
    """

    mode: Mode = means("what to do", Mode.train)
    steps: int = means("length of the training", number(above=0, at_most=COUNT), unit="optimizer steps")
    epochs: float | None = means(
        "passes over the training data, instead of steps, which follow from it; null: steps",
        later(number(None, above=0, at_most=10**6)),
    )
    batch_size: int = means(
        "sequences of one update, over all processes and micro-batches",
        number(above=0, at_most=10**6),
        unit="sequences",
    )
    micro_batch_size: int | None = means(
        "sequences of one forward and backward pass of a process; null: its whole share of the batch",
        number(None, above=0, at_most=10**6),
        unit="sequences",
    )
    seq_len: int = means("length of a training sequence", number(above=0, at_most=10**8), unit="tokens")
    seed: int = means(
        "of the weights, the order of the data and random bases", number(0, at_least=0, at_most=COUNT)
    )
    device: Device = means("where to train; auto: a GPU if there is one", Device.auto)
    precision: Precision = means("of weights and compute", Precision.auto)
    grad_clip: float | None = means(
        "largest global norm of the gradient, to which larger ones are scaled; null: no limit",
        number(None, above=0, at_most=FACTOR),
    )
    z_loss: float = means(
        "weight of (log Z)² beside the cross-entropy, Z the softmax's denominator",
        later(number(0.0, at_least=0, at_most=1)),
    )
    max_bad_steps: int = means(
        "batches with a bad loss or gradient that are skipped before the run fails",
        later(number(0, at_least=0, at_most=10**6)),
        unit="batches",
    )
    spike_factor: float | None = means(
        "a gradient norm of so many times the recent median is bad, too; null: never",
        later(number(None, above=1, at_most=FACTOR)),
    )
    compile: bool | None = means(
        "compile each block with torch.compile; null: to train or time on a GPU that has Triton",
        None,
    )
    deterministic: bool = means(
        "kernels whose sums are in one order, so that a resume on a GPU is bitwise; slower there",
        later(False),
    )
    activation_checkpointing: ActivationCheckpointing = means(
        "what the backward pass computes again instead of keeping it", ActivationCheckpointing.none
    )
    eval_every: int | None = means(
        "how often to evaluate; null: only at the end",
        number(None, above=0, at_most=COUNT),
        unit="optimizer steps",
    )
    save_every: int | None = means(
        "how often to save a checkpoint; null: only at the end",
        number(None, above=0, at_most=COUNT),
        unit="optimizer steps",
    )
    log_every: int = means(
        "how often to log a line of metrics", number(10, above=0, at_most=COUNT), unit="optimizer steps"
    )
    keep_checkpoints: int = means(
        "how many of the newest checkpoints to keep, beside the best",
        number(2, above=0, at_most=COUNT),
        unit="checkpoints",
    )
    max_seconds: float | None = means(
        "save and stop after so long, with exit status 75; null: no limit",
        number(None, above=0, at_most=FACTOR),
        unit="seconds",
    )
    run_name: str | None = means("name of the run's folder; null: made from the settings", None)
    output_dir: str = means("folder in which the run's folder is made", file_path("outputs"))
    cache_dir: str | None = means(
        "folder of tokenizers and tokens; null: $RSOTRAIN_CACHE_DIR or ~/.cache/rsotrain", file_path(None)
    )
    overwrite: bool = means("begin again in a folder that holds a run, which is lost", False)

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
    tune: TuneConfig = field(default_factory=TuneConfig)


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
