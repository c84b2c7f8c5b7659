"""Sequences made while training, by background processes, as exactly resumable as cached ones.

Place b of every batch of B is supplied by lane b·lanes // B, a stream of its own. So the batches are a
function of (seed, position), whoever reads which part of them: a rank that takes a slice of each batch needs
the lanes of that slice only, and a run goes on with another number of ranks. It also goes on with another
batch size, as long as that needs no other number of lanes: each lane goes on where it was.
"""

import os
import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from rsotrain.config.data import DataConfig, Packing
from rsotrain.data.background import BackgroundIterator
from rsotrain.data.documents import Corpus, Notify
from rsotrain.data.lanes import PAD, Lane, Mark, num_lanes
from rsotrain.data.order import FileOrder
from rsotrain.data.sequences import Batch
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.data.tokenizer import Tokenizer
from rsotrain.errors import UserError

PREFETCHED_SEQUENCES = 2048  # each process works at most about this far ahead

State = tuple[int, dict[int, Mark]]  # a position, and for each lane where its sequences from there on begin


class StreamedSequences:
    """The sequences of a corpus; the number of each is its position.

    They can be asked for batch after batch; another batch costs a new start of the processes, and reading
    up to it from the last known state or from the beginning. Batches begin ``batch_size`` apart, from the
    position on that ``load_state_dict`` gives, or from 0. ``share``: the places of a batch that this process
    will ask for; null: all. ``notify`` hears of bad rows that are skipped, again in each epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        data: DataConfig,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        notify: Notify,
        share: range | None = None,
    ) -> None:
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.share = share if share is not None else range(batch_size)
        self.lanes = lanes = num_lanes(data, corpus, batch_size)
        # without self: in a cycle, the processes of a stream that nobody closes would end late
        self._make_lane = lambda number: Lane(corpus, tokenizer, data, seq_len, seed, number, lanes)
        self._workers = data.workers
        self._notify = notify
        self._data = data
        # what a mark means depends on these
        self._order = [self.lanes, seed, data.packing.name, data.shuffle, data.shuffle_buffer]
        self._groups: list[BackgroundIterator] = []
        self._first = 0  # the position where a batch begins
        self._state: State = (0, {})
        self._rows: dict[int, np.ndarray] = {}  # the windows of a batch, by place
        self._position: int | None = None  # of _rows

    def order(self, seed: int) -> FileOrder:
        return FileOrder(None)

    def _places(self, lane: int) -> range:
        """The places of a batch that a lane supplies."""
        first, last = (-(-v * self.batch_size // self.lanes) for v in (lane, lane + 1))
        return range(first, last)

    def sequences_per_epoch(self) -> None:
        """Not known, since the documents are tokenised while training."""

    def order_settings(self) -> dict[str, int | bool | str]:
        data = self._data
        return {
            "packing": data.packing.name,
            "shuffle": data.shuffle,
            "streaming": True,
            "lanes": self.lanes,
            "shuffle_buffer": data.shuffle_buffer,
        }

    def position_after(self, sequences: int, seq_len: int) -> int:
        """As many tokens; a lane that goes on from its mark has seen them exactly."""
        packed = self._data.packing is Packing.packed
        return sequences * seq_len // self.seq_len if packed else sequences

    def batch(self, indices: np.ndarray) -> Batch:
        places = (indices - self._first) % self.batch_size
        positions = indices - places
        assert (positions == positions[0]).all(), "one call serves one batch"
        if positions[0] != self._position:
            self._read(int(positions[0]))
        rows = torch.from_numpy(np.stack([self._rows[place] for place in places.tolist()]).astype(np.int64))
        inputs = rows[:, :-1].clamp(min=0)
        return inputs, rows[:, 1:].masked_fill(rows[:, 1:] == PAD, IGNORE_INDEX)

    def _read(self, position: int) -> None:
        """Fill ``_rows`` with the batch that begins at ``position``."""
        if not self._groups or self._state[0] != position:
            self._start(position)
        marks: dict[int, Mark] = {}
        self._rows = {}
        try:
            for group in self._groups:
                rows, following, notes = _raised(next(group))
                for note in notes:
                    self._notify(note)
                places = [place for lane in following for place in self._places(lane)]
                self._rows |= zip(places, rows, strict=True)
                marks |= following
        except BaseException:
            self.close()  # some groups may be a batch ahead of others
            raise
        self._position = position
        self._state = (position + self.batch_size, marks)

    def _start(self, position: int) -> None:
        self.close()
        first, marks = self._state if self._state[0] <= position else (0, {})
        needed = sorted({place * self.lanes // self.batch_size for place in self.share})
        if not set(needed) <= marks.keys():
            first, marks = 0, {lane: Mark() for lane in needed}
        batches, rest = divmod(position - first, self.batch_size)
        workers = min(len(needed), self._workers or _spare_cores())
        for worker in range(workers):
            supplies = []
            for number in needed[worker::workers]:
                places = self._places(number)
                passed = batches * len(places) + sum(place < rest for place in places)
                supplies.append(_Supply(self._make_lane(number), marks[number], len(places), passed))
            ahead = 2 + PREFETCHED_SEQUENCES // self.batch_size
            self._groups.append(BackgroundIterator(_Group(supplies), ahead))

    def state_dict(self, position: int) -> dict[str, Any]:
        """The places in the corpus of the lanes that this process reads, where these are known."""
        marks = self._state[1] if self._state[0] == position else {}
        lanes = {str(lane): list(mark) for lane, mark in sorted(marks.items())}
        return {"order": self._order, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any], position: int) -> None:
        """Go on from a state of any number of ranks.

        Without one, or with one of other lanes or another order, what comes before is read again.
        Raises UserError for a state that is damaged.
        """
        marks: dict[int, Mark] = {}
        try:
            if state.get("order") == self._order:
                marks = {int(lane): _mark(mark) for lane, mark in state["lanes"].items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                "the checkpoint's record of its place in the stream makes no sense; take another checkpoint,"
                " or the weights alone with checkpoint.load=weights"
            ) from error
        self.close()
        self._first = position
        self._state = (position, marks) if marks else (0, {})

    def close(self) -> None:
        """End the background processes."""
        for group in self._groups:
            group.close()
        self._groups = []
        self._position, self._rows = None, {}


class _Supply(NamedTuple):
    """What a lane supplies: from ``mark`` on, ``per_batch`` windows, after the first ``passed`` of them."""

    lane: Lane
    mark: Mark
    per_batch: int
    passed: int


class _Group:
    """Some lanes of one process: each item is a batch's windows, the marks after it, and what is amiss."""

    def __init__(self, supplies: list[_Supply]) -> None:
        self.supplies = supplies

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[int, Mark], list[str]] | Exception]:
        notes: list[str] = []
        try:
            streams = []
            for lane, mark, per_batch, passed in self.supplies:
                lane.tokenizer.use_threads(1)
                windows = lane.windows(mark, notes.append)
                streams.append((lane.number, per_batch, islice(windows, passed, None)))
            while True:
                rows, marks = [], {}
                for number, per_batch, windows in streams:
                    for _ in range(per_batch):
                        row, marks[number] = next(windows)
                        rows.append(row)
                yield np.stack(rows), marks, notes.copy()
                notes.clear()
        except UserError as error:  # raised where the batch is asked for
            yield error
        except Exception:  # which need not survive being pickled, nor would its traceback
            yield RuntimeError(f"in a background process:\n{traceback.format_exc()}")


def _mark(saved: list[int]) -> Mark:
    """Raises TypeError or ValueError for what is none."""
    mark = Mark._make(saved)
    if not all(
        type(value) is int and least <= value < 2**62
        for value, least in zip(mark, (0, 0, 0, -1, 0), strict=True)
    ):
        raise ValueError("numbers are missing or out of range")
    return mark


def _raised(item: Any) -> Any:
    if isinstance(item, Exception):
        raise item
    return item


def _spare_cores() -> int:
    """Cores of this process's share of the machine, but the one that trains."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)
