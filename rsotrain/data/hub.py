"""Data sets of the Hugging Face hub, shard by shard, through ``datasets`` in its streaming form.

A shard is one file of the repository, opened only by the process that reads it: many ranks do not each ask
the hub for every file. A local folder laid out like a repository is read by the same code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from rsotrain.data.readers import BadRow, Position, Row
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

    def error(self, error: Exception) -> UserError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return UserError(
            f"{self.name} cannot be read from the Hugging Face hub ({reason}); check the name and the"
            " connection, or read local files with data=files or data=c4 data.path=…"
        )


@cache
def open_split(source: HubSource) -> Any:
    """The split as a ``datasets.IterableDataset``; nothing but its list of files is read.

    Raises UserError where there is no such data set, configuration or split, and without a connection.
    """
    import datasets

    try:
        return datasets.load_dataset(
            source.repository, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError) as error:  # DatasetNotFoundError, ConnectionError; unknown config, split
        raise source.error(error) from error


@dataclass(frozen=True)
class HubShard:
    source: HubSource
    index: int
    num_shards: int
    columns: tuple[str, ...]
    row_word: str = "row"

    @property
    def name(self) -> str:
        return f"{self.source.name} (file {self.index + 1} of {self.num_shards})"

    @property
    def size(self) -> int:
        return 0

    def rows(
        self, first: int = 0, step: int = 1, position: Position | None = None
    ) -> Iterator[tuple[int, Row | BadRow]]:
        """As ``FileShard.rows``; ``datasets`` itself passes over the rows before ``first``."""
        dataset = open_split(self.source).shard(num_shards=self.num_shards, index=self.index)
        names = dataset.column_names
        for column in self.columns:
            if names is not None and column not in names:
                raise UserError(
                    f"{self.source.name} has no column {column!r} (its columns: {', '.join(names)});"
                    " give the right one with data.text_field=…"
                )
        rows = enumerate(dataset.skip(first), start=first)
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError) as error:  # a lost connection, a damaged file
                raise self.source.error(error) from error
            if (number - first) % step == 0:
                yield number, row
