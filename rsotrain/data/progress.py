"""A progress bar over the documents of a corpus, in a terminal only."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rsotrain.data.documents import Corpus, Document, Notify


@contextmanager
def documents_with_bar(corpus: Corpus, notify: Notify) -> Iterator[Iterator[Document]]:
    """The documents of a corpus in order, with a bar by the bytes of the files where stderr is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield corpus.documents(notify)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=cast(IO[str], _Screen(sys.stderr)))
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=sum(shard.size for shard in corpus.shards) or None)
        yield corpus.documents(notify, lambda done: bar.update(task, completed=done))


class _Screen:
    """A terminal that may be closed at any time, which is no reason to stop reading."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
