"""The typed configuration of data, tokenizers and modes; part of ``config.py``, which names them all."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from rsotrain.config.later import later
from rsotrain.config.ranges import COUNT, SIZE, number
from rsotrain.config.text import file_path

# --- data --------------------------------------------------------------------------------------


class Packing(Enum):
    """packed: documents joined by separators and cut, nothing wasted. padded: a document a sequence."""

    packed = "packed"
    padded = "padded"


class SampleBy(Enum):
    """What one document of a text file is: the file, what stands between blank lines, or a line."""

    document = "document"
    paragraph = "paragraph"
    line = "line"


@dataclass
class DataConfig:
    """What every data set has.

    ``document_mask``: in packed sequences a token attends to its own document only. ``shuffle``: false is
    the order of the files. ``streaming``: tokenise in background processes while training, instead of
    once into the cache; ``lanes`` streams of documents then supply fixed places of each batch, whatever
    the number of processes, and ``shuffle_buffer`` documents of a lane are shuffled together.
    ``workers``: tokenising processes a rank (streaming) or threads; null: by the number of cores.
    ``max_bad_rows``: malformed rows that are skipped before a run stops (streaming: in each lane).
    """

    name: str = MISSING
    packing: Packing = Packing.packed
    document_mask: bool = False
    shuffle: bool = True
    streaming: bool = False
    lanes: int = number(8, above=0, at_most=10**6)
    shuffle_buffer: int = number(1000, above=0, at_most=10**9)
    workers: int | None = number(None, above=0, at_most=1024)
    max_bad_rows: int = number(0, at_least=0, at_most=COUNT)


@dataclass
class EmbeddedDataConfig(DataConfig):
    """The corpus that ships with the package."""


@dataclass
class SyntheticDataConfig(DataConfig):
    """Documents of invented words drawn by Zipf's law from a seed, for tests and benchmarks."""

    num_documents: int = number(2000, above=0, at_most=10**9)
    num_validation_documents: int = number(100, above=0, at_most=10**9)
    words_per_document: int = number(200, above=0, at_most=10**6)
    num_words: int = number(5000, above=0, at_most=10**6)
    corpus_seed: int = number(0, at_least=0, at_most=COUNT)


@dataclass
class FilesDataConfig(DataConfig):
    """JSON lines, Parquet, Arrow and text, plain or compressed (gz, xz, zst).

    ``path``: a file, a folder, or a glob such as ``'data/{a,b}/*.jsonl.gz'``. Validation is
    ``validation_path``, or the ``validation_fraction`` of the documents that a hash of their text picks.
    ``text_field``: a field of each row, or ``outer.inner`` for one inside another. ``sample_by`` is for text
    files; null: a file is a document.
    """

    path: str = file_path()
    validation_path: str | None = file_path(None)
    validation_fraction: float | None = number(None, above=0, below=1)
    text_field: str = "text"
    sample_by: SampleBy | None = None


@dataclass
class InstructionsDataConfig(DataConfig):
    """Prompts and responses for fine-tuning; the loss is that of the responses.

    ``prompt_template`` takes the fields of a row in braces; the response follows it at once. A field inside
    another is ``outer.inner``.
    """

    path: str = file_path()
    validation_path: str | None = file_path(None)
    validation_fraction: float | None = number(None, above=0, below=1)
    prompt_template: str = "### Instruction:\n{instruction}\n\n### Response:\n"
    response_field: str = "output"


@dataclass
class HubDataConfig(DataConfig):
    """A data set of the Hugging Face hub, or a local folder laid out like one, through ``datasets``.

    ``name``: of the repository. ``config``: one of its configurations. Validation is
    ``validation_split``, or the ``validation_fraction`` of the training documents by a hash of their text.
    """

    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    validation_fraction: float | None = number(None, above=0, below=1)
    text_field: str = "text"


@dataclass
class C4DataConfig(DataConfig):
    """C4 (English): from the hub, or from its ``c4-train.*.json.gz`` shards where ``path`` says."""

    path: str | None = file_path(None)
    validation_path: str | None = file_path(None)
    revision: str | None = None


# --- tokenizer ---------------------------------------------------------------------------------


class ModelType(Enum):
    bpe = "bpe"
    unigram = "unigram"


@dataclass
class TokenizerConfig:
    name: str = MISSING


@dataclass
class TrainedTokenizerConfig(TokenizerConfig):
    """A SentencePiece model with byte fallback, trained once on the training documents."""

    vocab_size: int = number(4096, at_least=260, at_most=SIZE)  # 3 special, 256 bytes, one character
    model_type: ModelType = ModelType.bpe
    character_coverage: float = number(0.9995, at_least=0.98, at_most=1)  # SentencePiece's own range
    max_training_bytes: int = number(20_000_000, above=0, at_most=COUNT)


@dataclass
class SentencePieceTokenizerConfig(TokenizerConfig):
    """A SentencePiece model in a file, as LLaMA, T5 and Mistral have them."""

    path: str = file_path()


@dataclass
class HubTokenizerConfig(TokenizerConfig):
    """The SentencePiece model ``file`` of a repository on the Hugging Face hub."""

    repository: str = MISSING
    file: str = MISSING
    revision: str | None = None


@dataclass
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """The tokenizer of a Hugging Face folder: its tokenizer.json, else its tokenizer.model."""

    path: str = file_path()


# --- what the modes read -----------------------------------------------------------------------


@dataclass
class GenerateConfig:
    """``temperature`` 0 takes the likeliest token; ``top_k`` null draws from the whole vocabulary.

    An empty prompt starts a document.
    """

    prompts: list[str] = field(default_factory=lambda: ["", "The "])
    max_new_tokens: int = number(48, above=0, at_most=10**6)
    temperature: float = number(0.8, at_least=0, at_most=1000)
    top_k: int | None = number(50, above=0, at_most=SIZE)


class ExportDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class ExportConfig:
    """``path``: the Hugging Face folder to write; ``dtype`` null: that of the checkpoint."""

    path: str | None = file_path(None)
    dtype: ExportDtype | None = None


@dataclass
class EvaluationConfig:
    """``max_tokens``: predicted tokens per evaluation, in file order; null: all of validation.

    ``at_start``: evaluate before the first step, too. ``patience``: training ends after so many evaluations
    in a row that were not better than the best before them by more than ``min_delta`` nats; null: at the last
    step.
    ``samples``: log ``generate.prompts`` continued by the model to W&B at each evaluation.
    ``legacy_divisor``: also log, as ``val/legacy_loss`` and ``val/legacy_perplexity``, the biased number of
    the published tables, which depends on ``micro_batch_size``; ``rsotrain.training.evaluation`` says how.
    The rest is for mode=evaluate: ``tasks`` of lm-eval, also those defined in ``tasks_path``, with
    ``num_fewshot`` examples, the first ``task_limit`` questions of each.
    """

    max_tokens: int | None = number(10_000_000, above=0, at_most=COUNT)
    micro_batch_size: int | None = number(None, above=0, at_most=10**6)  # null: the training micro-batch
    at_start: bool = later(False)
    patience: int | None = later(number(None, above=0, at_most=COUNT))
    min_delta: float = later(number(0.0, at_least=0, at_most=1000))
    samples: bool = True
    legacy_divisor: bool = False
    tasks: list[str] = field(default_factory=list)
    tasks_path: str | None = file_path(None)
    num_fewshot: int | None = number(None, at_least=0, at_most=10**4)
    task_limit: int | None = number(None, above=0, at_most=COUNT)


@dataclass
class BenchmarkConfig:
    """``steps`` are timed after ``warmup_steps``. ``profile``: write a trace of ``profile_steps`` more."""

    warmup_steps: int = number(3, above=0, at_most=10**6)
    steps: int = number(10, above=0, at_most=10**6)
    profile: bool = False
    profile_steps: int = number(2, above=0, at_most=1000)  # a trace of them is held in memory
