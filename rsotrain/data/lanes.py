"""A lane: an endless stream of sequences made from its share of a corpus, which can go on from any of them.

A corpus is cut into units, each some rows of a shard (row r of the shard belongs to stripe r mod stripes),
and the units are dealt to the lanes. Each epoch a lane reads its units in an order, and their documents,
block by block, in an order, that are functions of (seed, lane, epoch): so a lane's sequences do not depend
on who reads it, or on what other lanes do.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from math import gcd
from typing import NamedTuple

import numpy as np

from rsotrain.config.data import DataConfig, Packing
from rsotrain.data.documents import BadRows, Corpus, Document, Notify
from rsotrain.data.order import SequenceOrder
from rsotrain.data.tokenizer import Tokenizer
from rsotrain.data.tokens import encode_documents
from rsotrain.errors import UserError

PAD = -1  # in a window: no token
BLOCK_CHARACTERS = 8_000_000  # bounds the memory of documents that are shuffled together
ENCODED_DOCUMENTS = 32  # at a time


class Unit(NamedTuple):
    shard: int
    stripe: int
    stripes: int


class Mark(NamedTuple):
    """A place in a lane: token ``offset`` of a document and the separator after it.

    The document is number ``document`` of the block that starts at ``row`` of the ``unit``-th unit of the
    epoch; −1 is the separator before the first document of the epoch.
    """

    epoch: int = 0
    unit: int = 0
    row: int = 0
    document: int = -1
    offset: int = 0


def num_lanes(data: DataConfig, corpus: Corpus, batch_size: int) -> int:
    """As many as configured, but no more than sequences in a batch.

    Over a network a file should be read by one lane only, so the lanes must share the files evenly.
    """
    lanes = min(data.lanes, batch_size)
    return gcd(lanes, len(corpus.shards)) if corpus.remote else lanes


def lane_units(corpus: Corpus, lane: int, lanes: int) -> list[Unit]:
    """The units of one lane; every lane has equally many, and together they are the corpus."""
    stripes = lanes // gcd(lanes, len(corpus.shards))
    units = [Unit(shard, stripe, stripes) for shard in range(len(corpus.shards)) for stripe in range(stripes)]
    return units[lane::lanes]


@dataclass(frozen=True)
class Lane:
    """``windows`` are rows of seq_len + 1 tokens: the inputs, and moved one on, the targets."""

    corpus: Corpus
    tokenizer: Tokenizer
    data: DataConfig
    seq_len: int
    seed: int
    number: int
    lanes: int

    def windows(self, mark: Mark, notify: Notify) -> Iterator[tuple[np.ndarray, Mark]]:
        """(window, the mark from which the next one is made), without end: int32, shape (seq_len + 1,).

        ``notify`` hears of the bad rows that are skipped. Raises UserError for bad data and when an epoch
        does not fill one window.
        """
        make = self._packed if self.data.packing is Packing.packed else self._padded
        epoch_start = mark
        while True:
            window = None
            for window, following in make(epoch_start, notify):
                yield window, following
            fresh = Mark(epoch_start.epoch)
            if window is None and epoch_start == fresh:
                raise UserError(
                    f"{self.corpus.name}: lane {self.number} of {self.lanes} has less than one sequence of"
                    f" seq_len={self.seq_len}; lower data.lanes or seq_len, or use data.streaming=false"
                )
            epoch_start = Mark(epoch_start.epoch + 1)

    def _packed(self, mark: Mark, notify: Notify) -> Iterator[tuple[np.ndarray, Mark]]:
        """Until the end of the epoch. Each window begins with the last token of the one before."""
        pending: deque[tuple[Mark, np.ndarray]] = deque()
        num_pending, needed = 0, self.seq_len + 1
        for place, ids in self._pieces(mark, notify):
            pending.append((place, ids))
            num_pending += len(ids)
            while num_pending >= needed:
                parts, missing = [], needed
                while missing:
                    place, ids = pending[0]
                    parts.append(ids[:missing])
                    # The last token is left where it is, to begin the next window.
                    taken = min(len(ids), missing) - (missing <= len(ids))
                    missing -= min(len(ids), missing)
                    pending.popleft()
                    if taken < len(ids):
                        pending.appendleft((place._replace(offset=place.offset + taken), ids[taken:]))
                num_pending -= self.seq_len
                yield np.concatenate(parts), pending[0][0]

    def _padded(self, mark: Mark, notify: Notify) -> Iterator[tuple[np.ndarray, Mark]]:
        eos = np.array([self.tokenizer.eos_id], np.int32)
        for place, ids in self._pieces(mark._replace(document=max(mark.document, 0)), notify):
            window = np.full(self.seq_len + 1, PAD, np.int32)
            tokens = np.concatenate([eos, ids])[: self.seq_len + 1]
            window[: len(tokens)] = tokens
            yield window, place._replace(document=place.document + 1)

    def _pieces(self, mark: Mark, notify: Notify) -> Iterator[tuple[Mark, np.ndarray]]:
        """(place, tokens and the separator after them) of each document from ``mark`` to the epoch's end."""
        eos = np.array([self.tokenizer.eos_id], np.int32)
        if mark.document < 0:
            yield mark, eos
            mark = mark._replace(document=0)
        offset = mark.offset
        documents = self._documents(mark._replace(offset=0), notify)
        while batch := list(islice(documents, ENCODED_DOCUMENTS)):
            encoded = encode_documents([document for _, document in batch], self.tokenizer)
            for (place, _), ids in zip(batch, encoded, strict=True):
                yield place._replace(offset=offset), np.concatenate([ids, eos])[offset:]
                offset = 0

    def _documents(self, mark: Mark, notify: Notify) -> Iterator[tuple[Mark, Document]]:
        units = lane_units(self.corpus, self.number, self.lanes)
        bad = BadRows(self.data.max_bad_rows, notify)
        order = self._permutation(len(units), mark.epoch)
        for position in range(mark.unit, len(units)):
            unit = units[order[position]]
            row = max(mark.row, unit.stripe) if position == mark.unit else unit.stripe
            documents = self.corpus.shard_documents(unit.shard, bad, first=row, step=unit.stripes)
            first = mark.document if position == mark.unit else 0
            while block := self._block(documents):
                places = self._permutation(len(block), mark.epoch, position, row)
                for number in range(first, len(block)):
                    yield Mark(mark.epoch, position, row, number), block[places[number]][1]
                first = 0
                row = block[-1][0] + unit.stripes

    def _block(self, documents: Iterator[tuple[int, Document]]) -> list[tuple[int, Document]]:
        block: list[tuple[int, Document]] = []
        characters = 0
        for row, document in documents:
            block.append((row, document))
            characters += len(document.text)
            if len(block) == self.data.shuffle_buffer or characters >= BLOCK_CHARACTERS:
                break
        return block

    def _permutation(self, length: int, *what: int) -> list[int]:
        if not self.data.shuffle:
            return list(range(length))
        name = repr((self.seed, self.number, *what)).encode()
        seed = int.from_bytes(blake2b(name, digest_size=8).digest())
        return SequenceOrder(length, seed).indices(0, length).tolist()
