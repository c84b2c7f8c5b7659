"""Documents -> one flat file of token ids that is memory-mapped.

The stream is  eos, document, eos, document, eos, …: one separator that ends a document and begins the next.
It is eos because every tokenizer has one (T5 has no bos), it tells a model where to stop, and a second
separator would only add tokens that anyone can predict. The one at the very beginning gives the first
token of the first document something to be predicted from. So a text is generated from eos.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rsotrain.data.cache import Facts
from rsotrain.data.tokenizer import Tokenizer

LAYOUT = "eos (document eos)*"  # in the cache's key


@dataclass(frozen=True)
class TokenStream:
    """ids: shape (num_tokens,), uint16 or uint32, read-only. ``num_bytes``: of the documents as UTF-8."""

    ids: np.ndarray
    num_documents: int
    num_bytes: int


def write_tokens(file: BinaryIO, batches: Iterable[list[str]], tokenizer: Tokenizer) -> Facts:
    """Write the stream of some documents as a ``.npy`` file and return its counts.

    Memory holds one batch at a time: the header is written again once the length is known.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    eos = np.array([tokenizer.eos_id], np.int32)
    _write_header(file, dtype, 0)
    data_start = file.tell()
    num_tokens, num_documents, num_bytes = 1, 0, 0
    file.write(eos.astype(dtype).tobytes())
    for texts in batches:
        parts = [part for ids in tokenizer.encode(texts) for part in (ids, eos)]
        ids = np.concatenate(parts).astype(dtype)
        file.write(ids.tobytes())
        num_tokens += len(ids)
        num_documents += len(texts)
        num_bytes += sum(len(text.encode()) for text in texts)
    file.seek(0)
    _write_header(file, dtype, num_tokens)
    assert file.tell() == data_start, "numpy's header has grown over the first tokens"
    return {"num_tokens": num_tokens, "num_documents": num_documents, "num_bytes": num_bytes}


def _write_header(file: BinaryIO, dtype: np.dtype, num_tokens: int) -> None:
    # numpy leaves room in the header for a longer first axis
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def open_tokens(path: Path, facts: Facts) -> TokenStream:
    """Map a file of ``write_tokens`` into memory; ``facts`` is what that returned."""
    ids = np.asarray(np.load(path, mmap_mode="r"))  # slices of a plain array cost a tenth of a memmap's
    assert len(ids) == facts["num_tokens"]
    return TokenStream(ids, facts["num_documents"], facts["num_bytes"])
