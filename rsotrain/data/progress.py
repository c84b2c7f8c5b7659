"""A progress bar over the documents of a corpus, in a terminal only."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rsotrain.data.documents import Corpus, Document, Notify


@contextmanager
def documents_with_bar(corpus: Corpus, notify: Notify) -> Iterator[Iterator[Document]]:
    """The documents of a corpus in order, with a bar by the bytes of the files where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield corpus.documents(notify)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(shard.size for shard in corpus.shards) or None)
        yield corpus.documents(notify, lambda done: bar.update(task, completed=done))
