"""Data sets of the Hugging Face hub, shard by shard, through ``datasets`` in its streaming form.

A shard is one file of the repository, opened only by the process that reads it: many ranks do not each ask
the hub for every file. A local folder laid out like a repository is read by the same code.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rsotrain.data.finding import file_stamp, folder_files, shown
from rsotrain.data.rows import BadRow, Position, Row, names, outermost, reason
from rsotrain.errors import UserError


@dataclass(frozen=True)
class HubSource:
    """One split of one configuration of a repository."""

    repository: str
    config: str | None
    split: str
    revision: str | None = None

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.repository, self.config, self.split) if part)

    @property
    def folder(self) -> Path | None:
        """The local folder that stands in for a repository, if it is one."""
        try:
            return Path(self.repository) if Path(self.repository).is_dir() else None
        except (OSError, ValueError):  # a name that no file can have
            return None

    def error(self, error: Exception) -> UserError:
        place, cure = "from the Hugging Face hub", "check the name and the connection"
        if self.folder is not None:
            place, cure = "as a folder of the Hugging Face hub", "mend the folder"
        # how ``datasets`` ends when it looks for the fields of a file without a row
        said = "a file holds no rows" if isinstance(error, StopIteration) else reason(error)
        return UserError(
            f"{shown(self.name)} cannot be read {place} ({said}); {cure}, or read local files with"
            " data=files or data=c4 data.path=…"
        )


@cache
def open_split(source: HubSource) -> Any:
    """The split as a ``datasets.IterableDataset``; nothing but its list of files is read.

    Raises UserError where there is no such data set, configuration or split, without a connection, and for
    whatever else ``datasets`` cannot read: foreign code reads foreign files, with errors of every type.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # of what it logs as an error we say more
    if source.folder is not None:
        folder_files(source.folder, "data.name")  # before a pipe is waited for
    try:
        return datasets.load_dataset(
            source.repository, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as error:
        raise source.error(error) from error


@dataclass(frozen=True)
class HubShard:
    """``stamps``: of a local folder's files as their fingerprint was taken; null on the hub."""

    source: HubSource
    index: int
    num_shards: int
    columns: tuple[str, ...]
    row_word: str = "row"
    stamps: str | None = None

    @property
    def name(self) -> str:
        return f"{shown(self.source.name)} (file {self.index + 1} of {self.num_shards})"

    @property
    def size(self) -> int:
        return 0

    def rows(
        self, first: int = 0, step: int = 1, position: Position | None = None
    ) -> Iterator[tuple[int, Row | BadRow]]:
        """As ``FileShard.rows``; ``datasets`` itself passes over the rows before ``first``."""
        self._check_unchanged()
        dataset = open_split(self.source).shard(num_shards=self.num_shards, index=self.index)
        present = dataset.column_names
        for column in self.columns:
            if present is not None and outermost(column, present) is None:
                raise UserError(
                    f"{shown(self.source.name)} has no column {column!r} (its columns: {names(present)});"
                    " give the right one with data.text_field=…"
                )
        rows = enumerate(dataset.skip(first), start=first)
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # a lost connection, a damaged file; see open_split
                self._check_unchanged()
                raise self.source.error(error) from error
            if (number - first) % step == 0:
                yield number, row
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self.stamps is not None and folder_stamps(self.source) != self.stamps:
            raise UserError(
                f"the files of {shown(self.source.name)} have changed since they were first looked at; start"
                " again when nothing writes to them"
            )


def folder_stamps(source: HubSource) -> str | None:
    """What tells whether the files of a local folder have changed; None for a repository on the hub."""
    if source.folder is None:
        return None
    files = folder_files(source.folder, "data.name")
    stamps = repr([(str(file), file_stamp(file, "data.name")) for file in files])
    return hashlib.sha256(stamps.encode(errors="surrogateescape")).hexdigest()
