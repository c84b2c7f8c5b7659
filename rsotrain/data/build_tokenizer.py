"""Tokenizer configuration -> tokenizer: trained, read from a file, or fetched from the hub."""

from pathlib import Path
from typing import BinaryIO

from rsotrain.config.data import (
    HubTokenizerConfig,
    HuggingFaceTokenizerConfig,
    SentencePieceTokenizerConfig,
    TokenizerConfig,
    TrainedTokenizerConfig,
)
from rsotrain.data.cache import BrokenFileError, Facts, cached_file
from rsotrain.data.documents import Corpus, Notify, sample_texts
from rsotrain.data.rows import reason
from rsotrain.data.tokenizer import SentencePieceTokenizer, Tokenizer
from rsotrain.data.tokenizer_huggingface import load_tokenizer
from rsotrain.data.tokenizer_process import train_tokenizer_apart
from rsotrain.errors import UserError

STREAMED_SAMPLES = 4  # a streamed corpus is read this many times the sample's size to draw it


def build_tokenizer(
    config: TokenizerConfig, train: Corpus, cache_dir: Path, notify: Notify, *, streaming: bool
) -> Tokenizer:
    """Raises UserError for a file that is missing or no tokenizer, and for a hub that cannot be reached."""
    if isinstance(config, TrainedTokenizerConfig):
        return _trained(config, train, cache_dir, notify, streaming)
    return read_tokenizer(config)


def read_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """One that is not trained here; raises as ``build_tokenizer``."""
    match config:
        case SentencePieceTokenizerConfig():
            return _read(Path(config.path).expanduser(), "tokenizer.path")
        case HuggingFaceTokenizerConfig():
            return load_tokenizer(Path(config.path).expanduser())
        case HubTokenizerConfig():
            return _read(_fetch(config), f"tokenizer={config.name}")
    raise TypeError(f"no builder for {type(config).__name__}")


def _trained(
    config: TrainedTokenizerConfig, train: Corpus, cache_dir: Path, notify: Notify, streaming: bool
) -> Tokenizer:
    def build(file: BinaryIO) -> Facts:
        notify(f"training a tokenizer of {config.vocab_size:,} pieces on {train.name}")
        limit = STREAMED_SAMPLES * config.max_training_bytes if streaming else None
        texts = sample_texts(train.documents(notify), config.max_training_bytes, limit)
        if not texts:
            raise UserError(f"{train.name} has no documents; give another")
        file.write(train_tokenizer_apart(texts, config))
        return {}

    settings = {
        **train.key(),
        "vocab_size": config.vocab_size,
        "model_type": config.model_type.name,
        "character_coverage": config.character_coverage,
        "max_training_bytes": config.max_training_bytes,
        "streaming": streaming,
    }

    def check(path: Path, _: Facts) -> None:
        try:
            found = SentencePieceTokenizer(path.read_bytes())
        except UserError as error:
            raise BrokenFileError("it is no SentencePiece model") from error
        if found.vocab_size != config.vocab_size:
            raise BrokenFileError(f"it has {found.vocab_size} pieces")

    path, _ = cached_file(cache_dir, "tokenizers.model", settings, build, notify, check)
    return SentencePieceTokenizer(path.read_bytes())


def _read(path: Path, name: str) -> Tokenizer:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}={path} cannot be read ({error.strerror})") from error
    return SentencePieceTokenizer(model, f"{name}={path}")


def _fetch(config: HubTokenizerConfig) -> Path:
    """The file in the hub's own cache, downloaded where it is not there yet."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(config.repository, config.file, revision=config.revision))
    except Exception as error:  # of the hub, of the network below it, of its own checks: errors of every type
        raise UserError(
            f"tokenizer={config.name} needs {config.file} of {config.repository} from the Hugging Face hub,"
            f" which cannot be had ({reason(error)}); download it elsewhere and give it with"
            " tokenizer=sentencepiece tokenizer.path=…"
        ) from error
