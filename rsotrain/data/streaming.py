"""Sequences made while training, by background processes, as exactly resumable as cached ones.

Place b of every batch of B is supplied by lane b·lanes // B, a stream of its own. So the batches are a
function of (seed, step), whoever reads which part of them: a rank that takes a slice of each batch needs
the lanes of that slice only, and a run goes on with another number of ranks.
"""

import os
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rsotrain.config.data import DataConfig
from rsotrain.data.background import BackgroundIterator
from rsotrain.data.documents import Corpus, Notify
from rsotrain.data.lanes import PAD, Lane, Mark, num_lanes
from rsotrain.data.order import FileOrder
from rsotrain.data.sequences import Batch
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.data.tokenizer import Tokenizer
from rsotrain.errors import UserError

PREFETCHED_SEQUENCES = 2048  # each process works at most about this far ahead

State = tuple[int, dict[int, Mark]]  # step, and for each lane where its sequences of that step begin


class StreamedSequences:
    """The sequences of a corpus; their numbers are step · batch_size + place in the batch.

    They can be asked for step after step; another step costs a new start of the processes, and reading up
    to it from the last known state or from the beginning. ``share``: the places of a batch that this
    process will ask for; null: all. ``notify`` hears of bad rows that are skipped, again in each epoch.
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
        # what a mark means depends on these
        self._order = [self.lanes, seed, data.packing.name, data.shuffle, data.shuffle_buffer]
        self._groups: list[BackgroundIterator] = []
        self._state: State = (0, {})
        self._rows: dict[int, np.ndarray] = {}  # the windows of a step, by place in the batch
        self._step = -1  # of _rows

    def order(self, seed: int) -> FileOrder:
        return FileOrder(None)

    def _places(self, lane: int) -> range:
        """The places of a batch that a lane supplies."""
        first, last = (-(-v * self.batch_size // self.lanes) for v in (lane, lane + 1))
        return range(first, last)

    def batch(self, indices: np.ndarray) -> Batch:
        steps = indices // self.batch_size
        assert (steps == steps[0]).all(), "one call serves one step"
        if steps[0] != self._step:
            self._read_step(int(steps[0]))
        places = (indices - steps[0] * self.batch_size).tolist()
        rows = torch.from_numpy(np.stack([self._rows[place] for place in places]).astype(np.int64))
        inputs = rows[:, :-1].clamp(min=0)
        return inputs, rows[:, 1:].masked_fill(rows[:, 1:] == PAD, IGNORE_INDEX)

    def _read_step(self, step: int) -> None:
        if not self._groups or step != self._step + 1:
            self._start(step)
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
            self.close()  # some groups may be a step ahead of others
            raise
        self._step = step
        self._state = (step + 1, marks)

    def _start(self, step: int) -> None:
        self.close()
        first, marks = self._state if self._state[0] <= step else (0, {})
        needed = sorted({place * self.lanes // self.batch_size for place in self.share})
        if not set(needed) <= marks.keys():
            first, marks = 0, {lane: Mark() for lane in needed}
        workers = min(len(needed), self._workers or _spare_cores())
        for worker in range(workers):
            group = _Group(
                [(self._make_lane(n), len(self._places(n)), marks[n]) for n in needed[worker::workers]],
                skip=step - first,
            )
            ahead = 2 + PREFETCHED_SEQUENCES // self.batch_size
            self._groups.append(BackgroundIterator(group, ahead))

    def state_dict(self) -> dict[str, Any]:
        """The next step and the places in the corpus of the lanes that this process reads."""
        step, marks = self._state
        lanes = {str(lane): list(mark) for lane, mark in sorted(marks.items())}
        return {"step": step, "order": self._order, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of any number of ranks.

        Without one, or with one of other lanes or another order, what comes before is read again.
        """
        if state.get("order") != self._order:
            return
        self.close()
        self._state = (state["step"], {int(lane): Mark(*mark) for lane, mark in state["lanes"].items()})

    def close(self) -> None:
        """End the background processes."""
        for group in self._groups:
            group.close()
        self._groups = []
        self._step, self._rows = -1, {}


class _Group:
    """Some lanes of one process: each item is a step's windows, the marks after it, and what is amiss."""

    def __init__(self, lanes: list[tuple[Lane, int, Mark]], skip: int) -> None:
        self.lanes = lanes
        self.skip = skip

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[int, Mark], list[str]] | Exception]:
        for lane, _, _ in self.lanes:
            lane.tokenizer.use_threads(1)
        notes: list[str] = []
        streams = [(lane.number, count, lane.windows(mark, notes.append)) for lane, count, mark in self.lanes]
        skip = self.skip
        try:
            while True:
                rows, marks = [], {}
                for number, count, windows in streams:
                    for _ in range(count):
                        row, marks[number] = next(windows)
                        rows.append(row)
                if skip == 0:
                    yield np.stack(rows), marks, notes.copy()
                    notes.clear()
                skip = max(0, skip - 1)
        except UserError as error:  # raised where the batch is asked for
            yield error
        except Exception:  # which need not survive being pickled, nor would its traceback
            yield RuntimeError(f"in a background process:\n{traceback.format_exc()}")


def _raised(item: Any) -> Any:
    if isinstance(item, Exception):
        raise item
    return item


def _spare_cores() -> int:
    """Cores of this process's share of the machine, but the one that trains."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)
