"""Streamed sequences: those of the cache, the same for any number of ranks and workers, resumed exactly."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.corpora import write_c4

from rsotrain.config.data import (
    C4DataConfig,
    DataConfig,
    FilesDataConfig,
    HubDataConfig,
    Packing,
    TrainedTokenizerConfig,
)
from rsotrain.data.build import Data, build_data
from rsotrain.data.build_tokenizer import build_tokenizer
from rsotrain.data.documents import Corpus
from rsotrain.data.lanes import Lane, Mark, lane_units
from rsotrain.data.sources import open_corpora
from rsotrain.data.streaming import StreamedSequences
from rsotrain.data.tokenizer import Tokenizer
from rsotrain.errors import UserError

Files = tuple[Path, Path]
SEQ_LEN, BATCH = 16, 8


def ignore(_: str) -> None:
    """What is amiss."""


def settings(corpus: Files, **keywords: Any) -> FilesDataConfig:
    return FilesDataConfig("files", path=str(corpus[0]), validation_path=str(corpus[1]), **keywords)


def build(data: DataConfig, cache_dir: Path, **keywords: Any) -> Data:
    return build_data(
        data,
        TrainedTokenizerConfig("trained", vocab_size=300),
        seq_len=SEQ_LEN,
        cache_dir=cache_dir,
        notify=lambda _: None,
        batch_size=BATCH,
        **keywords,
    )


def streamed(corpus: Corpus, tokenizer: Tokenizer, data: DataConfig) -> StreamedSequences:
    return StreamedSequences(
        corpus, tokenizer, data, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, notify=ignore
    )


def steps(data: Data, numbers: range, share: slice = slice(None), seed: int = 0) -> list[torch.Tensor]:
    """(2, share, seq_len): inputs and targets of each step."""
    order = data.train.order(seed)
    return [torch.stack(data.train.batch(order.indices(step * BATCH, BATCH)[share])) for step in numbers]


@pytest.fixture(scope="module")
def tokenizer(corpus: Files, cache_dir: Path) -> Tokenizer:
    train, _ = open_corpora(settings(corpus), cache_dir)
    config = TrainedTokenizerConfig("trained", vocab_size=300)
    return build_tokenizer(config, train, cache_dir, lambda _: None, streaming=False)


def lane(data: DataConfig, tokenizer: Tokenizer, cache_dir: Path, number: int = 0, lanes: int = 1) -> Lane:
    return Lane(open_corpora(data, cache_dir)[0], tokenizer, data, SEQ_LEN, 7, number, lanes)


def take(windows: Any, count: int) -> tuple[np.ndarray, list[Mark]]:
    pairs = [next(windows) for _ in range(count)]
    return np.stack([window for window, _ in pairs]), [mark for _, mark in pairs]


@pytest.mark.parametrize("packing", Packing)
def test_one_lane_in_file_order_gives_the_cached_sequences(
    packing: Packing, corpus: Files, cache_dir: Path
) -> None:
    shared: dict[str, Any] = {"packing": packing, "shuffle": False}
    cached = build(settings(corpus, **shared), cache_dir)
    streamed = build(settings(corpus, **shared, streaming=True, lanes=1), cache_dir)
    per_epoch = len(cached.train) // BATCH  # type: ignore[arg-type]
    for start in (0, per_epoch - 2):  # also over the end of an epoch
        numbers = range(start, start + 5)
        for one, other in zip(steps(cached, numbers), steps(streamed, numbers), strict=True):
            assert torch.equal(one, other)
    streamed.train.close()


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_lane_goes_on_from_every_mark(
    packing: Packing, shuffle: bool, corpus: Files, cache_dir: Path, tokenizer: Tokenizer
) -> None:
    # blocks of 7 documents: resuming in the middle of a block, of a document and of an epoch (300 documents)
    data = settings(corpus, packing=packing, shuffle=shuffle, shuffle_buffer=7)
    one = lane(data, tokenizer, cache_dir, number=1, lanes=3)
    windows, marks = take(one.windows(Mark(), ignore), 2000 if packing is Packing.packed else 250)
    assert marks[-1].epoch >= 1
    for i in (0, 1, 5, 33, 98, 99, 100, 101, len(marks) - 4):
        again, marks_again = take(one.windows(Mark(*json.loads(json.dumps(marks[i]))), ignore), 3)
        assert np.array_equal(again, windows[i + 1 : i + 4])
        assert marks_again == marks[i + 1 : i + 4]


def test_lanes_share_the_documents_and_an_epoch_has_each_once(
    corpus: Files, cache_dir: Path, tokenizer: Tokenizer
) -> None:
    data = settings(corpus, packing=Packing.padded, shuffle_buffer=16)
    texts = [json.loads(line)["text"] for line in corpus[0].read_text().splitlines()]
    starts = sorted(tuple(ids[:SEQ_LEN].tolist()) for ids in tokenizer.encode(texts))
    for lanes in (1, 4, 7):
        seen = []
        for number in range(lanes):
            windows = lane(data, tokenizer, cache_dir, number, lanes).windows(Mark(), ignore)
            for window, mark in windows:
                seen.append(tuple(window[1:].tolist()))
                if len(seen) == len(texts) * (number + 1) // lanes or mark.epoch:
                    break
        # 300 documents divide among the lanes but for one; so each lane's share is read once
        assert len(set(seen) & set(starts)) >= len(set(starts)) - lanes
    order = [tuple(w[1:].tolist()) for w, _ in (next(windows) for _ in range(20))]
    assert order != starts[:20]


def test_every_lane_has_equally_many_units_and_a_remote_file_one_reader(tmp_path: Path) -> None:
    folder = write_c4(tmp_path / "c4", num_files=6)
    train, _ = open_corpora(HubDataConfig(name=str(folder), config="en"), tmp_path)
    for lanes in (1, 2, 3, 4, 6, 8):
        units = [lane_units(train, number, lanes) for number in range(lanes)]
        assert len({len(u) for u in units}) == 1
        together = sorted(unit for u in units for unit in u)
        assert together == sorted(set(together))
        assert {u.stripes for u in together} == {lanes // np.gcd(lanes, 6)}
        assert len(together) == 6 * together[0].stripes
    from rsotrain.data.lanes import num_lanes

    assert [num_lanes(DataConfig("x", lanes=n), train, BATCH) for n in (1, 2, 3, 4, 8)] == [1, 2, 3, 2, 2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_disjoint_parts_of_the_one_rank_order(
    world_size: int, corpus: Files, cache_dir: Path
) -> None:
    data = settings(corpus, streaming=True, lanes=4, shuffle_buffer=20)
    whole = build(data, cache_dir)
    expected = steps(whole, range(4))
    parts = []
    for rank in range(world_size):
        share = range(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        part = build(data, cache_dir, share=share)
        parts.append(steps(part, range(4), slice(share.start, share.stop)))
        assert len(part.train.state_dict(4 * BATCH)["lanes"]) == 4 // world_size  # it has read no other lane
        part.train.close()
    for step, together in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat(together, dim=1), expected[step])
    whole.train.close()


def test_a_stream_resumes_with_the_next_sequence_whatever_the_workers(corpus: Files, cache_dir: Path) -> None:
    first = build(settings(corpus, streaming=True, workers=1), cache_dir)
    expected = steps(first, range(9))
    early = build(settings(corpus, streaming=True, workers=3), cache_dir)
    assert torch.equal(steps(early, range(5))[-1], expected[4])
    state = json.loads(json.dumps(early.train.state_dict(5 * BATCH)))
    early.train.close()
    assert len(state["lanes"]) == BATCH
    assert early.train.state_dict(4 * BATCH)["lanes"] == {}  # these are known of the next batch alone
    late = build(settings(corpus, streaming=True, workers=2), cache_dir)
    late.train.load_state_dict(state, 5 * BATCH)
    for step, batch in zip(range(5, 9), steps(late, range(5, 9)), strict=True):
        assert torch.equal(batch, expected[step])
    # back to an earlier step, and forward past some, without a state that fits: read from the beginning
    assert torch.equal(steps(late, range(2, 3))[0], expected[2])
    assert torch.equal(steps(late, range(7, 8))[0], expected[7])
    for data in (first, late):
        data.train.close()


def test_a_stream_without_a_state_goes_on_after_as_many_sequences_of_its_own(
    corpus: Files, cache_dir: Path, tokenizer: Tokenizer
) -> None:
    """Three batches and five sequences are passed over: so many windows of each lane, by its places."""
    data = settings(corpus, streaming=True, lanes=4)
    late = streamed(open_corpora(data, cache_dir)[0], tokenizer, data)
    late.load_state_dict({}, 3 * BATCH + 5)
    order = late.order(0)
    for batch in range(2):
        inputs, _ = late.batch(order.indices(3 * BATCH + 5 + batch * BATCH, BATCH))
        for number, passed in enumerate((8, 8, 7, 6)):  # places 0 and 1, 2 and 3, 4, none
            one = Lane(open_corpora(data, cache_dir)[0], tokenizer, data, SEQ_LEN, 0, number, 4)
            windows, _ = take(one.windows(Mark(), ignore), passed + 2 * batch + 2)
            assert inputs[2 * number : 2 * number + 2].tolist() == windows[-2:, :-1].tolist()
    late.close()


@pytest.mark.parametrize("changes", [{"lanes": 4}, {"shuffle_buffer": 7}, {"packing": Packing.padded}, {}])
def test_a_state_of_another_order_is_no_place_to_go_on_from(
    changes: dict[str, Any], corpus: Files, cache_dir: Path
) -> None:
    data = settings(corpus, streaming=True)
    first = build(data, cache_dir)
    steps(first, range(3))
    state = first.train.state_dict(3 * BATCH)
    first.train.close()
    seed = 0 if changes else 1
    for each in ({"streaming": True}, {"streaming": False}):
        other = settings(corpus, **each, **changes)
        whole, late = build(other, cache_dir, seed=seed), build(other, cache_dir, seed=seed)
        late.train.load_state_dict(json.loads(json.dumps(state)), 3 * BATCH)
        expected = steps(whole, range(5), seed=seed)[3:]
        for batch, right in zip(steps(late, range(3, 5), seed=seed), expected, strict=True):
            assert torch.equal(batch, right)
        whole.train.close()
        late.train.close()


def test_c4_shards_stream_alike_from_files_and_through_datasets_and_resume_inside_one(
    tmp_path: Path, cache_dir: Path, tokenizer: Tokenizer
) -> None:
    folder = write_c4(tmp_path / "c4")  # three shards of 100 documents
    files = C4DataConfig(
        "c4", path=str(folder / "en/c4-train.*"), validation_path=str(folder / "en/c4-val*"), lanes=3
    )
    sources = (files, HubDataConfig(name=str(folder), config="en", lanes=3))

    def stream(data: DataConfig) -> StreamedSequences:
        data.streaming, data.shuffle_buffer = True, 30
        train, _ = open_corpora(data, cache_dir)
        return StreamedSequences(
            train, tokenizer, data, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, notify=ignore
        )

    streams = [stream(data) for data in sources]
    for step in range(6):
        one, other = (torch.stack(s.batch(s.order(0).indices(step * BATCH, BATCH))) for s in streams)
        assert torch.equal(one, other)
    state = streams[0].state_dict(6 * BATCH)
    assert {mark[1] for mark in state["lanes"].values()} == {0}  # inside the first shard of each lane
    expected = streams[0].batch(np.arange(6 * BATCH, 7 * BATCH))
    late = stream(sources[1])
    late.load_state_dict(state, 6 * BATCH)
    for one, other in zip(late.batch(np.arange(6 * BATCH, 7 * BATCH)), expected, strict=True):
        assert torch.equal(one, other)
    for each in (*streams, late):
        each.close()


def test_seeds_shuffle_and_epochs_differ(corpus: Files, cache_dir: Path) -> None:
    one, other = (build(settings(corpus, streaming=True), cache_dir, seed=seed) for seed in (0, 1))
    assert not torch.equal(steps(one, range(1))[0], steps(other, range(1))[0])
    one.train.close()
    other.train.close()


def test_errors_of_a_worker_arrive_as_one_sentence(
    corpus: Files, cache_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus[0].read_bytes() + b"{not json\n")
    data = settings((bad, corpus[1]), streaming=True, shuffle_buffer=1000, lanes=2)
    train, _ = open_corpora(data, cache_dir)
    stream = StreamedSequences(
        train, tokenizer, data, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, notify=ignore
    )
    with pytest.raises(UserError, match=r"bad.jsonl: line 301 is not valid JSON") as caught:
        stream.batch(np.arange(BATCH))
    assert "\n" not in str(caught.value)


def test_skipped_rows_of_a_worker_are_named(
    corpus: Files, cache_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"{not json\n" + corpus[0].read_bytes())
    data = settings((bad, corpus[1]), streaming=True, lanes=1, max_bad_rows=1)
    train, _ = open_corpora(data, cache_dir)
    notes: list[str] = []
    stream = StreamedSequences(
        train, tokenizer, data, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, notify=notes.append
    )
    stream.batch(np.arange(BATCH))
    stream.close()
    (note,) = notes
    assert note.startswith("warning: ")
    assert "bad.jsonl: line 1 is not valid JSON" in note
    assert note.endswith("skipped")


def test_a_lane_without_a_whole_sequence_is_refused(
    corpus: Files, cache_dir: Path, tokenizer: Tokenizer
) -> None:
    data = settings((corpus[1], corpus[1]), streaming=True)
    train, _ = open_corpora(data, cache_dir)
    stream = StreamedSequences(train, tokenizer, data, seq_len=1000, batch_size=BATCH, seed=0, notify=ignore)
    with pytest.raises(UserError, match=r"lane 0 of 8 has less than one sequence of seq_len=1000; lower"):
        stream.batch(np.arange(BATCH))


def test_no_background_process_outlives_its_stream(
    corpus: Files, cache_dir: Path, tokenizer: Tokenizer
) -> None:
    """They ignore the signals with which a process that ends would end its children, and then waits."""
    train, _ = open_corpora(settings(corpus, streaming=True), cache_dir)
    others = set(multiprocessing.active_children())

    def started() -> tuple[StreamedSequences, multiprocessing.process.BaseProcess]:
        data = settings(corpus, streaming=True, workers=1)
        stream = StreamedSequences(
            train, tokenizer, data, seq_len=SEQ_LEN, batch_size=BATCH, seed=0, notify=ignore
        )
        stream.batch(np.arange(BATCH))
        (process,) = set(multiprocessing.active_children()) - others
        process.terminate()
        return stream, process

    def ends(process: multiprocessing.process.BaseProcess) -> bool:
        process.join(20)
        return process.exitcode is not None

    stream, process = started()
    time.sleep(0.1)
    assert process.is_alive()
    del stream  # nobody closes it
    assert ends(process)
