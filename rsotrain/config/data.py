"""The typed configuration of data, tokenizers and modes; part of ``config.py``, which names them all."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from rsotrain.config.later import later
from rsotrain.config.meanings import means
from rsotrain.config.ranges import COUNT, FACTOR, SIZE, number
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
    """What every data set has."""

    name: str = means("name of the data set", MISSING)
    packing: Packing = means("how documents become sequences", Packing.packed)
    document_mask: bool = means("in packed sequences a token attends to its own document only", False)
    shuffle: bool = means("false: the order of the files", True)
    streaming: bool = means(
        "tokenise in background processes while training, instead of once into the cache", False
    )
    lanes: int = means(
        "streams of documents that supply fixed places of each batch (streaming)",
        number(8, above=0, at_most=10**6),
        unit="streams",
    )
    shuffle_buffer: int = means(
        "documents of a lane that are shuffled together (streaming)",
        number(1000, above=0, at_most=10**9),
        unit="documents",
    )
    workers: int | None = means(
        "tokenising processes of a rank (streaming), or threads; null: by the number of cores",
        number(None, above=0, at_most=1024),
        unit="processes",
    )
    max_bad_rows: int = means(
        "malformed rows that are skipped before a run stops (streaming: in each lane)",
        number(0, at_least=0, at_most=COUNT),
        unit="rows",
    )


@dataclass
class EmbeddedDataConfig(DataConfig):
    """The corpus that ships with the package."""


@dataclass
class SyntheticDataConfig(DataConfig):
    """Documents of invented words drawn by Zipf's law from a seed, for tests and benchmarks."""

    num_documents: int = means(
        "documents of the training set", number(2000, above=0, at_most=10**9), unit="documents"
    )
    num_validation_documents: int = means(
        "documents of the validation set", number(100, above=0, at_most=10**9), unit="documents"
    )
    words_per_document: int = means("length of a document", number(200, above=0, at_most=10**6), unit="words")
    num_words: int = means("different words", number(5000, above=0, at_most=10**6), unit="words")
    corpus_seed: int = means("of the text, whatever the run's seed", number(0, at_least=0, at_most=COUNT))


@dataclass
class FilesDataConfig(DataConfig):
    """JSON lines, Parquet, Arrow and text, plain or compressed (gz, xz, zst)."""

    path: str = means("a file, a folder, or a glob such as 'data/{a,b}/*.jsonl.gz'", file_path())
    validation_path: str | None = means("the same for validation; null: validation_fraction", file_path(None))
    validation_fraction: float | None = means(
        "share of the documents (by a hash), or of each of few texts, to validate on; null: validation_path",
        number(None, above=0, below=1),
    )
    text_field: str = means("field of a row that holds the text; outer.inner for one inside another", "text")
    sample_by: SampleBy | None = means("what one document of a text file is; null: the file", None)


@dataclass
class InstructionsDataConfig(DataConfig):
    """Prompts and responses for fine-tuning; the loss is that of the responses."""

    path: str = means("a file, a folder, or a glob of rows with prompt and response", file_path())
    validation_path: str | None = means("the same for validation; null: validation_fraction", file_path(None))
    validation_fraction: float | None = means(
        "share of the rows, by a hash of their text, to validate on; null: validation_path",
        number(None, above=0, below=1),
    )
    prompt_template: str = means(
        "the prompt, with fields of a row in braces; the response follows at once",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    )
    response_field: str = means("field of a row that holds the response", "output")


@dataclass
class HubDataConfig(DataConfig):
    """A data set of the Hugging Face hub, or a local folder laid out like one, through ``datasets``.

    ``name`` is that of the repository.
    """

    config: str | None = means("configuration of the data set; null: its only one", None)
    revision: str | None = means("branch, tag or commit; null: the newest", None)
    train_split: str = means("split to train on", "train")
    validation_split: str | None = means("split to validate on; null: validation_fraction", "validation")
    validation_fraction: float | None = means(
        "share of the training documents, by a hash of their text, to validate on; null: validation_split",
        number(None, above=0, below=1),
    )
    text_field: str = means("field of a row that holds the text", "text")


@dataclass
class C4DataConfig(DataConfig):
    """C4 (English): from the hub, or from its ``c4-train.*.json.gz`` shards where ``path`` says."""

    path: str | None = means("its shards on disk, c4-train.*.json.gz; null: the hub", file_path(None))
    validation_path: str | None = means("its validation shards on disk; null: the hub", file_path(None))
    revision: str | None = means("branch, tag or commit on the hub; null: the newest", None)


# --- tokenizer ---------------------------------------------------------------------------------


class ModelType(Enum):
    bpe = "bpe"
    unigram = "unigram"


@dataclass
class TokenizerConfig:
    name: str = means("name of the tokenizer", MISSING)


@dataclass
class TrainedTokenizerConfig(TokenizerConfig):
    """A SentencePiece model with byte fallback, trained once on the training documents."""

    vocab_size: int = means(
        "pieces: 3 special ones, 256 bytes, and the rest",
        number(4096, at_least=260, at_most=SIZE),
        unit="pieces",
    )
    model_type: ModelType = means("kind of SentencePiece model", ModelType.bpe)
    character_coverage: float = means(
        "share of the text's characters that become pieces; the others are bytes",
        number(0.9995, at_least=0.98, at_most=1),
    )  # SentencePiece's own range
    max_training_bytes: int = means(
        "text that the tokenizer is trained on", number(20_000_000, above=0, at_most=COUNT), unit="bytes"
    )


@dataclass
class SentencePieceTokenizerConfig(TokenizerConfig):
    """A SentencePiece model in a file, as LLaMA, T5 and Mistral have them."""

    path: str = means("file of the model", file_path())


@dataclass
class HubTokenizerConfig(TokenizerConfig):
    """The SentencePiece model ``file`` of a repository on the Hugging Face hub."""

    repository: str = means("repository on the Hugging Face hub", MISSING)
    file: str = means("file in it", MISSING)
    revision: str | None = means("branch, tag or commit; null: the newest", None)


@dataclass
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """The tokenizer of a Hugging Face folder: its tokenizer.json, else its tokenizer.model."""

    path: str = means("folder with tokenizer.json or tokenizer.model", file_path())


# --- what the modes read -----------------------------------------------------------------------


@dataclass
class GenerateConfig:
    """What mode=generate writes, and the samples of a training run."""

    prompts: list[str] = means(
        "texts to continue; an empty one starts a document", field(default_factory=lambda: ["", "The "])
    )
    max_new_tokens: int = means("length of a continuation", number(48, above=0, at_most=10**6), unit="tokens")
    temperature: float = means(
        "of the draw; 0 takes the likeliest token", number(0.8, at_least=0, at_most=1000)
    )
    top_k: int | None = means(
        "draw from so many of the likeliest tokens; null: from all",
        number(50, above=0, at_most=SIZE),
        unit="tokens",
    )


class ExportDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class ExportConfig:
    """What mode=export writes."""

    path: str | None = means(
        "Hugging Face folder to write; null: beside the checkpoint's run", file_path(None)
    )
    dtype: ExportDtype | None = means("of the exported weights; null: that of the checkpoint", None)


@dataclass
class EvaluationConfig:
    """Evaluation, in training and in mode=evaluate; the tasks of lm-eval are for the latter."""

    max_tokens: int | None = means(
        "predicted tokens of an evaluation, in file order; null: all of validation",
        number(10_000_000, above=0, at_most=COUNT),
        unit="tokens",
    )
    micro_batch_size: int | None = means(
        "sequences of one pass; null: the training's", number(None, above=0, at_most=10**6), unit="sequences"
    )
    at_start: bool = means("evaluate before the first step, too", later(False))
    patience: int | None = means(
        "end after so many evaluations in a row without a better one; null: at the last step",
        later(number(None, above=0, at_most=COUNT)),
        unit="evaluations",
    )
    min_delta: float = means(
        "by how much an evaluation must be better to count",
        later(number(0.0, at_least=0, at_most=1000)),
        unit="nats per token",
    )
    samples: bool = means("log generate.prompts, continued by the model, to Weights & Biases", True)
    legacy_divisor: bool = means(
        "also log val/legacy_loss and val/legacy_perplexity, the biased numbers of the published tables",
        False,
    )
    tasks: list[str] = means("tasks of lm-eval (mode=evaluate)", field(default_factory=list))
    tasks_path: str | None = means("folder with tasks of your own; null: none", file_path(None))
    num_fewshot: int | None = means(
        "examples in a task's prompt; null: the task's own number",
        number(None, at_least=0, at_most=10**4),
        unit="examples",
    )
    task_limit: int | None = means(
        "first questions of each task; null: all", number(None, above=0, at_most=COUNT), unit="questions"
    )


@dataclass
class BenchmarkConfig:
    """What mode=benchmark does."""

    warmup_steps: int = means(
        "steps before the timed ones", number(3, above=0, at_most=10**6), unit="optimizer steps"
    )
    steps: int = means("timed steps", number(10, above=0, at_most=10**6), unit="optimizer steps")
    profile: bool = means("write a Chrome trace, too", False)
    profile_steps: int = means(
        "steps in the trace, which is held in memory",
        number(2, above=0, at_most=1000),
        unit="optimizer steps",
    )


@dataclass
class TuneConfig:
    """What mode=tune does: each trial is a run whose ``key`` is the first value times a power of ``factor``.

    The first value is that of the configuration."""

    key: str = means("the number that is tuned", "optimizer.scale")
    factor: float = means("between a value and the next", number(2.0, above=1, at_most=1000))
    lowest: float | None = means(
        "the smallest value that is tried; null: what the key allows",
        number(None, at_least=0, at_most=FACTOR),
    )
    highest: float | None = means(
        "the largest value that is tried; null: what the key allows", number(None, above=0, at_most=FACTOR)
    )
    max_values: int = means(
        "end without a best that lies inside after so many", number(12, above=2, at_most=1000), unit="values"
    )
    path: str | None = means(
        "folder for tuned/NAME.yaml, which --config-dir takes; null: conf in output_dir", file_path(None)
    )
    name: str | None = means("of that file; null: the method and the model", None)
