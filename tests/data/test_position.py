"""A run that goes on with other batches or sequences takes up the data where the other one left it."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import call_main

from rsotrain.cli import entry
from rsotrain.config.data import FilesDataConfig, TrainedTokenizerConfig
from rsotrain.data.build import build_data
from rsotrain.data.position import other_order, saved_position
from rsotrain.data.sequences import PackedSequences, PaddedSequences
from rsotrain.errors import UserError
from rsotrain.training.trainer import Trainer

Row = tuple[int, ...]
Seen = Callable[..., list[Row]]


@pytest.fixture
def seen(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Run the command; the inputs of each sequence that it trains on, in order."""
    original = Trainer.micro_batches
    taken: list[Row] = []

    def micro_batches(self: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = original(self)
        taken.extend(tuple(row) for inputs, _ in batches for row in inputs.tolist())
        return batches

    monkeypatch.setattr(Trainer, "micro_batches", micro_batches)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str) -> list[Row]:
        taken.clear()
        chosen = dict(o.split("=", 1) for o in [*tiny, "optimizer=adam", f"run_name={name}", *overrides])
        assert call_main(entry, [f"{key}={value}" for key, value in chosen.items()]) == 0
        return taken.copy()

    return run


@pytest.fixture
def whole(seen: Seen) -> list[Row]:
    """The first 64 sequences of an uninterrupted run."""
    return seen("whole", "batch_size=16", "steps=4")


def forget_the_position(run: Path) -> None:
    """Make the checkpoints of a run those of an earlier version."""
    for file in run.glob("checkpoints/*/trainer.json"):
        record = json.loads(file.read_text())
        del record["sequences"], record["order"]
        file.write_text(json.dumps(record))
        checksums = json.loads((file.parent / "checksums.json").read_text())
        checksums["trainer.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (file.parent / "checksums.json").write_text(json.dumps(checksums))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["written now", "of an earlier version"])
@pytest.mark.parametrize(("before", "after"), [(16, 8), pytest.param(8, 16, marks=pytest.mark.long), (8, 12)])
def test_another_batch_size_neither_repeats_nor_skips_a_sequence(
    kind: str, before: int, after: int, seen: Seen, tmp_path: Path, whole: list[Row]
) -> None:
    first = seen("first", f"batch_size={before}", "steps=3")
    assert first == whole[: 3 * before]
    if kind == "of an earlier version":
        forget_the_position(tmp_path / "outputs/first")
    second = seen("second", "checkpoint.path=outputs/first", f"batch_size={after}", "steps=5")
    assert second == whole[3 * before :][: 2 * after]


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_without_its_settings_is_of_a_run_like_this(
    seen: Seen, tmp_path: Path, whole: list[Row]
) -> None:
    seen("first", "batch_size=8", "steps=3")
    forget_the_position(tmp_path / "outputs/first")
    (tmp_path / "outputs/first/config.yaml").unlink()
    assert seen("second", "checkpoint.path=outputs/first", "batch_size=8", "steps=4") == whole[24:32]


@pytest.mark.slow
def test_a_run_that_went_on_with_other_batches_resumes_where_it_was(
    seen: Seen, tmp_path: Path, whole: list[Row]
) -> None:
    seen("first", "batch_size=8", "steps=3")
    second = [
        "checkpoint.path=outputs/first",
        "batch_size=6",
        "steps=7",
        "save_every=1",
        "keep_checkpoints=4",
    ]
    assert seen("second", *second) == whole[24:48]
    folder = tmp_path / "outputs/second"
    for step in (6, 7):
        shutil.rmtree(folder / f"checkpoints/step_{step:08d}")
    (folder / "summary.json").unlink()
    assert seen("second", *second) == whole[36:48]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(16, 8), (8, 16)])
def test_lanes_go_on_where_they_were_with_another_batch_size(before: int, after: int, seen: Seen) -> None:
    streaming = ["data.streaming=true", "data.workers=1", "eval_every=null"]
    first = seen("first", *streaming, f"batch_size={before}", "steps=3")
    second = seen("second", "checkpoint.path=outputs/first", *streaming, f"batch_size={after}", "steps=5")
    # 8 lanes: batches of another size take as many windows of each, but lay them out otherwise
    total = 3 * before + 2 * after
    straight = seen("straight", *streaming, "batch_size=8", f"steps={total // 8}")
    assert Counter(first + second) == Counter(straight)
    assert len(set(straight)) == len(straight)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_sequences_of_another_length_begin_with_the_first_not_seen_whole(streaming: bool, seen: Seen) -> None:
    options = ["data.shuffle=false", "batch_size=4"]
    options += ["data.streaming=true", "data.lanes=1", "data.workers=1"] if streaming else []
    first = seen("first", *options, "seq_len=32", "steps=5")
    second = seen("second", "checkpoint.path=outputs/first", *options, "seq_len=24", "steps=8")
    text = [token for row in seen("text", *options, "seq_len=8", "steps=40") for token in row]
    assert [token for row in first for token in row] == text[: 5 * 4 * 32]
    # 640 tokens are 26 sequences of 24 and 16 tokens of the next; a lane has cut them anew from there on
    begin = 640 if streaming else 26 * 24
    assert [token for row in second for token in row] == text[begin : begin + 3 * 4 * 24]


@pytest.mark.slow
def test_an_order_that_cannot_be_kept_is_said(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    seen("first", "steps=3")
    seen("same", "checkpoint.path=outputs/first", "batch_size=8", "steps=4")
    assert "another order" not in capsys.readouterr().out
    seen("other", "checkpoint.path=outputs/first", "seq_len=16", "seed=1", "steps=4")
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "warning: seed was 0 and is 1, seq_len was 32 and is 16: from here on the sequences come in" in told
    )


# --- the position itself ---------------------------------------------------------------------------


def packed(seq_len: int, shuffle: bool = True) -> PackedSequences:
    tokens = np.arange(101, dtype=np.uint16)
    return PackedSequences(tokens, seq_len, num_bytes=1, vocab_size=101, shuffle=shuffle)


@pytest.mark.parametrize(
    ("sequences", "seq_len", "position"),
    [
        (0, 10, 0),
        (3, 10, 3),
        (23, 10, 23),
        (3, 20, 6),  # 60 tokens
        (7, 5, 3),  # 35 tokens: the fourth is not seen whole
        (7, 2, 1),
        (14, 7, 10),  # an epoch of 14 sequences of 7: 98 tokens of 100
        (29, 7, 20),  # two epochs and one sequence of 7
        (30, 7, 21),
        (13, 30, 43),  # four epochs of 3 and one of 30 tokens
    ],
)
def test_packed_sequences_count_epochs_and_the_tokens_of_the_last(
    sequences: int, seq_len: int, position: int
) -> None:
    assert len(packed(10)) == 10
    assert packed(10).position_after(sequences, seq_len) == position


def test_padded_sequences_count_documents() -> None:
    starts = np.arange(1, 100, 5)
    lengths = np.arange(len(starts)) % 4
    spans = np.stack([starts, starts + lengths, starts + 4], axis=1)
    keywords: dict[str, Any] = {"num_bytes": 1, "vocab_size": 101}
    tokens = np.arange(101, dtype=np.uint16)
    plain = PaddedSequences(tokens, 3, spans=spans, **keywords)
    assert [plain.position_after(n, 8) for n in (0, 7, 20, 47)] == [0, 7, 20, 47]
    prompts = PaddedSequences(tokens, 3, spans=spans, prompts=True, **keywords)
    assert (len(prompts), prompts.num_sequences(8)) == (15, 20)  # a prompt of 3 leaves no room in 3
    assert [prompts.position_after(n, 8) for n in (0, 7, 20, 47)] == [0, 7, 15, 37]


@pytest.mark.parametrize("damage", [-1, 1.5, "3", None, True, 10**30, [1]])
@pytest.mark.parametrize("key", ["sequences", "seq_len"])
def test_a_record_that_makes_no_sense_is_one_sentence(key: str, damage: Any) -> None:
    saved: dict[str, Any] = {"step": 3, "sequences": 12, "order": {"seq_len": 10}}
    assert saved_position(saved, packed(10), 4) == 12
    assert saved_position({"step": 3}, packed(10), 4) == 12
    if key == "sequences":
        saved["sequences"] = damage
    else:
        saved["order"] = {"seq_len": damage}
    with pytest.raises(UserError, match=r"record of its place in the data makes no sense"):
        saved_position(saved, packed(10), 4)


def test_only_an_order_that_is_another_is_told() -> None:
    def told(seq_len: int, shuffle: bool, there: dict[str, Any] | None = None) -> str | None:
        order = {"seed": 0, "seq_len": 10, "packing": "packed", "shuffle": shuffle, "streaming": False}
        return other_order({"order": order | (there or {})}, packed(seq_len, shuffle), 0)

    assert told(10, True) is None
    assert told(20, False) is None
    assert "seq_len was 10 and is 20" in (told(20, True) or "")
    for key, value in (("packing", "padded"), ("shuffle", False), ("streaming", True)):
        assert f"data.{key} was {value} and is " in (told(10, True, {key: value}) or "")
    assert other_order({}, packed(10), 0) is None


@pytest.mark.parametrize(
    "lanes",
    [[1], {"a": [0, 0, 0, 0, 0]}, {"0": [0, 0]}, {"0": "abcde"}, {"0": [0, 0, -1, 0, 0]}, {"0": None}, 3],
)
def test_a_damaged_place_in_a_stream_is_one_sentence(
    lanes: Any, corpus: tuple[Path, Path], cache_dir: Path
) -> None:
    data = build_data(
        FilesDataConfig("files", path=str(corpus[0]), validation_path=str(corpus[1]), streaming=True),
        TrainedTokenizerConfig("trained", vocab_size=300),
        seq_len=16,
        cache_dir=cache_dir,
        notify=lambda _: None,
        batch_size=4,
    )
    state = data.train.state_dict(0)
    with pytest.raises(UserError, match=r"place in the stream makes no sense"):
        data.train.load_state_dict(state | {"lanes": lanes}, 8)
