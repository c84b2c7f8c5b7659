"""JSON-lines files -> Hugging Face data sets of texts.

The lines are parsed here rather than by ``load_dataset("json")``: that one infers a schema from the first
10 MB and then refuses a field that first occurs later, turns texts that look like dates into timestamps,
looks up a host, and cannot say which line is at fault.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rsotrain.data.cache import hash_file
from rsotrain.data.order import SequenceOrder
from rsotrain.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

READ_BATCH_DOCUMENTS = 64  # bounds memory: documents may be whole books
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Source:
    """A file with one JSON object a line, gzipped or not, and the field that holds the text."""

    path: Path
    text_field: str = "text"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes. Raises UserError when it cannot be read."""
        try:
            return hash_file(self.path)
        except OSError as error:
            raise UserError(f"the data file {self.path} cannot be read ({error.strerror})") from error


def parse_line(line: bytes, text_field: str) -> str:
    """The text of one JSON object. Raises UserError with what is wrong with it."""
    try:
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError("is not UTF-8; convert the file, for example with iconv -t UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON ({error}); write one object a line") from error
    if not isinstance(document, dict):
        raise UserError("is not a JSON object; write one object a line")
    if text_field not in document:
        fields = ", ".join(sorted(document)) or "none"
        raise UserError(
            f"has no field {text_field!r} (its fields: {fields}); give the right one with data.text_field=…"
        )
    text = document[text_field]
    if not isinstance(text, str):
        raise UserError(f"has a {type(text).__name__} in the field {text_field!r}; make it a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is no character
        raise UserError("holds half a surrogate pair; write its text as valid Unicode") from error
    return text


def read_texts(path: str, text_field: str) -> Iterator[dict[str, str]]:
    """Each document of a file that is not empty, as {"text": …}.

    Raises UserError, with the file and the line, at the first thing that is not as it should be.
    """
    with open(path, "rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
    try:
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.isspace():
                    continue
                try:
                    text = parse_line(line, text_field)
                except UserError as error:
                    raise UserError(f"{path}: line {number} {error}") from error
                if text:
                    yield {"text": text}
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); copy it again") from error


def load_documents(source: Source, folder: Path) -> "Dataset":
    """The documents of a file as a memory-mapped table with one column, ``text``, kept in ``folder``.

    Raises UserError for a file that is empty or malformed.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        dataset = datasets.Dataset.from_generator(
            read_texts,
            features=datasets.Features({"text": datasets.Value("large_string")}),
            cache_dir=str(folder),
            gen_kwargs={"path": str(source.path), "text_field": source.text_field},
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise UserError(f"the data file {source.path} has no documents; give another") from error
    return dataset


def batches(documents: "Dataset") -> Iterator[list[str]]:
    """The texts in file order, in lists of a bounded length."""
    for batch in documents.iter(READ_BATCH_DOCUMENTS):
        yield batch["text"]


def shuffled_texts(documents: "Dataset") -> Iterator[str]:
    """All texts in one fixed random order, so that any number of the first ones is a fair sample."""
    order = SequenceOrder(len(documents), seed=0)
    num_batches, rest = divmod(len(documents), READ_BATCH_DOCUMENTS)
    for step in range(num_batches):
        yield from documents[order.indices(step, READ_BATCH_DOCUMENTS)]["text"]
    if rest:
        yield from documents[order.indices(num_batches, READ_BATCH_DOCUMENTS)[:rest]]["text"]
