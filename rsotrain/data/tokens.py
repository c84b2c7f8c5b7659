"""Documents -> one flat file of token ids that is memory-mapped.

The stream is  eos, document, eos, document, eos, …: one separator that ends a document and begins the next.
It is eos because every tokenizer has one (T5 has no bos), it tells a model where to stop, and a second
separator would only add tokens that anyone can predict. The one at the very beginning gives the first
token of the first document something to be predicted from. So a text is generated from eos.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rsotrain.data.cache import BrokenFileError, Facts
from rsotrain.data.documents import Document
from rsotrain.data.tokenizer import Tokenizer

LAYOUT = "eos (document eos)*"  # in the cache's key
SCAN_TOKENS = 1 << 22  # bounds the memory that a pass over the stream takes


@dataclass(frozen=True)
class TokenStream:
    """ids: shape (num_tokens,), uint16 or uint32, read-only. ``num_bytes``: of the documents as UTF-8."""

    ids: np.ndarray
    num_documents: int
    num_bytes: int


def encode_documents(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each document, prompt and text encoded one by one: int32, without separators."""
    ids = tokenizer.encode([document.text for document in documents])
    if any(document.prompt for document in documents):
        prompts = tokenizer.encode([document.prompt for document in documents])
        ids = [np.concatenate(both) for both in zip(prompts, ids, strict=True)]
    return ids


def write_tokens(
    file: BinaryIO,
    batches: Iterable[list[Document]],
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
) -> Facts:
    """Write the stream of some documents as a ``.npy`` file and return its counts.

    Memory holds one batch at a time: the header is written again once the length is known. ``max_tokens``:
    stop after the batch that reaches as many.
    """
    dtype = _dtype(tokenizer)
    eos = np.array([tokenizer.eos_id], np.int32)
    _write_header(file, dtype, 0)
    data_start = file.tell()
    num_tokens, num_documents, num_bytes = 1, 0, 0
    file.write(eos.astype(dtype).tobytes())
    for documents in batches:
        parts = [part for ids in encode_documents(documents, tokenizer) for part in (ids, eos)]
        ids = np.concatenate(parts).astype(dtype)
        file.write(ids.tobytes())
        num_tokens += len(ids)
        num_documents += len(documents)
        num_bytes += sum(len(d.prompt.encode()) + len(d.text.encode()) for d in documents)
        if max_tokens is not None and num_tokens > max_tokens:
            break
    file.seek(0)
    _write_header(file, dtype, num_tokens)
    assert file.tell() == data_start, "numpy's header has grown over the first tokens"
    return {"num_tokens": num_tokens, "num_documents": num_documents, "num_bytes": num_bytes}


def write_spans(
    file: BinaryIO, stream: "TokenStream", eos_id: int, prompt_lengths: Iterable[int] | None
) -> Facts:
    """Write where the documents of a stream lie: ``.npy``, int64 (num_documents, 3), and return nothing.

    Each row: the document's first token, the first token after its prompt, its separator.
    ``prompt_lengths``: in tokens, of each document; null: there are no prompts.
    """
    dtype = np.dtype(np.int64)
    _write_header(file, dtype, (stream.num_documents, 3))
    lengths = None if prompt_lengths is None else iter(prompt_lengths)
    start = 1
    for first in range(1, len(stream.ids), SCAN_TOKENS):
        ends = first + np.flatnonzero(stream.ids[first : first + SCAN_TOKENS] == eos_id)
        if ends.size:
            starts = np.concatenate([[start], ends[:-1] + 1])
            prompts = np.array([next(lengths) for _ in starts], np.int64) if lengths is not None else 0
            file.write(np.stack([starts, starts + prompts, ends], axis=1).astype(dtype).tobytes())
            start = int(ends[-1]) + 1
    return {}


def _write_header(file: BinaryIO, dtype: np.dtype, shape: int | tuple[int, ...]) -> None:
    # numpy leaves room in the header for a longer first axis
    shape = (shape,) if isinstance(shape, int) else shape
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def open_tokens(path: Path, facts: Facts) -> TokenStream:
    """Map a file of ``write_tokens`` into memory; ``facts`` is what that returned."""
    return TokenStream(_mapped(path), facts["num_documents"], facts["num_bytes"])


def check_tokens(path: Path, facts: Facts, tokenizer: Tokenizer) -> None:
    """Raise BrokenFileError for what ``write_tokens`` cannot have written."""
    ids = _mapped(path)
    counts: list[Any] = [facts.get(name) for name in ("num_tokens", "num_documents", "num_bytes")]
    _require(ids.ndim == 1 and ids.dtype == _dtype(tokenizer), "it holds no tokens")
    _require(all(type(count) is int and count > 0 for count in counts), "its description is damaged")
    _require(len(ids) == counts[0] > counts[1], "it has not as many tokens as its description says")
    largest = max(int(ids[i : i + SCAN_TOKENS].max()) for i in range(0, len(ids), SCAN_TOKENS))
    _require(largest < tokenizer.vocab_size, f"it holds a token {largest}, which the tokenizer has not")


def open_spans(path: Path) -> np.ndarray:
    """Map a file of ``write_spans`` into memory."""
    return _mapped(path)


def check_spans(path: Path, stream: TokenStream) -> None:
    """Raise BrokenFileError for what ``write_spans`` cannot have written for ``stream``."""
    spans = _mapped(path)
    _require(spans.dtype == np.int64 and spans.shape == (stream.num_documents, 3), "it holds no spans")
    starts, prompts, ends = spans.T
    in_order = (starts <= prompts).all() and (prompts <= ends).all() and (ends[:-1] < starts[1:]).all()
    _require(bool(in_order) and starts[0] >= 1 and ends[-1] < len(stream.ids), "its spans lie elsewhere")


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r"))  # slices of a plain array cost a tenth of a memmap's
    except (ValueError, EOFError, SyntaxError, TypeError, LookupError, OverflowError) as error:
        raise BrokenFileError("it is no array") from error


def _require(condition: bool, how: str) -> None:
    if not condition:
        raise BrokenFileError(how)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
