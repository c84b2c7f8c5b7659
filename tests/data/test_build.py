"""From files to packed tokens: the stream, the cache when things go wrong, and one sentence for bad input."""

import gzip
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rsotrain.config.data import FilesDataConfig, TrainedTokenizerConfig
from rsotrain.data import cache
from rsotrain.data.build import Data, build_data
from rsotrain.errors import UserError

Files = tuple[Path, Path]
SEQ_LEN = 16
GOOD = b'{"text": "the ship sailed on"}\n' * 20


def ignore(_: str) -> None:
    """For a test that is not about the messages."""


def build(
    files: Files,
    cache_dir: Path,
    notify: Callable[[str], None] = ignore,
    *,
    vocab_size: int = 300,
    seq_len: int = SEQ_LEN,
    text_field: str = "text",
) -> Data:
    train, validation = files
    return build_data(
        FilesDataConfig("files", path=str(train), validation_path=str(validation), text_field=text_field),
        TrainedTokenizerConfig("trained", vocab_size=vocab_size),
        seq_len=seq_len,
        cache_dir=cache_dir,
        notify=notify,
    )


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def cached(cache_dir: Path) -> dict[str, tuple[bytes, int]]:
    """Name -> (content, modification time) of all files in a cache."""
    return {
        str(path.relative_to(cache_dir)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in cache_dir.rglob("*")
        if path.is_file()
    }


# --- the stream ------------------------------------------------------------------------------------


def test_the_stream_is_the_documents_with_eos_between(corpus: Files, tmp_path: Path) -> None:
    data = build(corpus, tmp_path)
    for sequences, path in ((data.train, corpus[0]), (data.validation, corpus[1])):
        texts, eos = texts_of(path), data.tokenizer.eos_id
        naive = [eos]
        for text in texts:
            naive += [*data.tokenizer.encode([text])[0].tolist(), eos]
        assert sequences.tokens.tolist() == naive
        assert sequences.num_tokens == len(naive)
        assert sequences.num_bytes == sum(len(text.encode()) for text in texts)
        assert sequences.vocab_size == data.tokenizer.vocab_size == 300
        assert len(sequences) == (len(naive) - 1) // SEQ_LEN
        assert naive.count(eos) == len(texts) + 1  # one before the first and one after each


def test_tokens_are_mapped_and_small(corpus: Files, tmp_path: Path) -> None:
    tokens = build(corpus, tmp_path).train.tokens
    assert isinstance(tokens.base, np.memmap)
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable


def test_gzip_blank_lines_and_empty_documents_change_nothing(corpus: Files, tmp_path: Path) -> None:
    lines = corpus[0].read_bytes().splitlines(keepends=True)
    padded = b"\xef\xbb\xbf" + b'\n{"text": "", "late": 1}\n  \n'.join(lines) + b"\n\n"
    packed = tmp_path / "train.json.gz"
    packed.write_bytes(gzip.compress(padded))
    plain, other = build(corpus, tmp_path / "a"), build((packed, corpus[1]), tmp_path / "b")
    assert other.train.tokens.tolist() == plain.train.tokens.tolist()
    assert other.train.num_bytes == plain.train.num_bytes


def test_sequence_length_is_not_part_of_the_cache(corpus: Files, tmp_path: Path) -> None:
    build(corpus, tmp_path)
    before = cached(tmp_path)
    assert build(corpus, tmp_path, seq_len=2 * SEQ_LEN).train.seq_len == 2 * SEQ_LEN
    assert cached(tmp_path) == before


# --- the cache -------------------------------------------------------------------------------------


def test_the_cache_is_used_again_and_leaves_nothing_else(corpus: Files, tmp_path: Path) -> None:
    messages: list[str] = []
    first = build(corpus, tmp_path, messages.append)
    assert len(messages) == 5  # training, and two lines for each of the two files
    before = cached(tmp_path)
    assert len(before) == 6
    messages.clear()
    second = build(corpus, tmp_path, messages.append)
    assert messages == []
    assert cached(tmp_path) == before
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert second.validation.num_bytes == first.validation.num_bytes


@pytest.mark.parametrize("change", ["vocab_size", "train", "validation"])
def test_what_changes_is_made_again(change: str, corpus: Files, tmp_path: Path) -> None:
    files = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    for source, copy in zip(corpus, files, strict=True):
        copy.write_bytes(source.read_bytes())
    cache_dir = tmp_path / "cache"
    build(files, cache_dir)
    for path, name in zip(files, ("train", "validation"), strict=True):
        if change == name:  # as many bytes, the same time: only the content tells
            times = path.stat().st_atime_ns, path.stat().st_mtime_ns
            path.write_bytes(path.read_bytes().replace(b"ship", b"boat"))
            os.utime(path, ns=times)
    messages: list[str] = []
    data = build(files, cache_dir, messages.append, vocab_size=290 if change == "vocab_size" else 300)
    assert len(messages) == (2 if change == "validation" else 5)
    assert len(data.tokenizer.encode([" boat"])[0]) < 5 or change != "train"
    assert (
        data.validation.tokens.tolist()[1:-1]
        == [t for text in texts_of(files[1]) for t in [*data.tokenizer.encode([text])[0].tolist(), 2]][:-1]
    )


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def wrong_json(path: Path) -> None:
    path.write_text('["size"]')


BREAKAGES = [
    *((suffix, damage) for suffix in ("npy", "model") for damage in (truncate, flip_a_bit, empty, remove)),
    *(
        (suffix, damage)
        for suffix in ("npy.json", "model.json")
        for damage in (truncate, empty, remove, wrong_json)
    ),
]


@pytest.mark.parametrize(("suffix", "damage"), BREAKAGES)
def test_a_broken_cache_is_told_once_and_built_again(
    suffix: str, damage: Callable[[Path], None], corpus: Files, tmp_path: Path
) -> None:
    whole = build(corpus, tmp_path).train.tokens.tolist()
    before = {name: content for name, (content, _) in cached(tmp_path).items()}
    broken = max(tmp_path.rglob(f"*.{suffix}"), key=lambda path: path.stat().st_size)
    damage(broken)
    messages: list[str] = []
    assert build(corpus, tmp_path, messages.append).train.tokens.tolist() == whole
    told = [message for message in messages if "broken" in message]
    assert len(told) == 1
    assert "\n" not in told[0]
    assert str(broken).removesuffix(".json") in told[0]
    assert {name: content for name, (content, _) in cached(tmp_path).items()} == before


def test_an_open_stream_survives_a_rebuild(corpus: Files, tmp_path: Path) -> None:
    first = build(corpus, tmp_path).train
    before = first.tokens.tolist()
    remove(max(tmp_path.rglob("*.npy.json"), key=lambda path: path.stat().st_size))
    build(corpus, tmp_path)
    assert first.tokens.tolist() == before


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: object) -> cache.Facts:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached_file(tmp_path, "thing.bin", {"a": 1}, fail, ignore)
    assert cached(tmp_path) == {}
    path, facts = cache.cached_file(tmp_path, "thing.bin", {"a": 1}, lambda f: {"n": f.write(b"ab")}, ignore)
    assert (path.read_bytes(), facts) == (b"ab", {"n": 2})


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path) -> None:
    old, busy, new = (tmp_path / "tmp" / name for name in ("old", "busy", "new"))
    for folder in (old, busy, new):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    yesterday = time.time() - 1.01 * cache.ABANDONED_SECONDS
    for path in (old, old / "part", busy):  # the file in busy is still being written
        os.utime(path, (yesterday, yesterday))
    with cache.temporary_folder(tmp_path) as folder:
        assert {path.name for path in (tmp_path / "tmp").iterdir()} == {"busy", "new", folder.name}


def start_together(barrier: object, files: Files, cache_dir: Path, result: Path) -> None:
    """In a process of its own: build while all others do, and write down what comes of it."""

    def meet(message: str) -> None:
        if "training a tokenizer" in message:  # having found none; nobody goes on before all have
            barrier.wait(timeout=100)  # type: ignore[attr-defined]

    data = build(files, cache_dir, meet)
    result.write_text(
        json.dumps(
            {
                "model": data.tokenizer.fingerprint,
                "tokens": data.train.tokens.tolist() + data.validation.tokens.tolist(),
            }
        )
    )


def test_processes_that_start_at_once_end_with_equal_whole_caches(corpus: Files, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "rsotrain.data.build"])  # imported once for the three
    cache_dir, barrier = tmp_path / "cache", context.Barrier(3)
    build(corpus, cache_dir)
    flip_a_bit(max(cache_dir.rglob("*.npy"), key=lambda path: path.stat().st_size))  # one broken …
    for path in cache_dir.rglob("*.model*"):  # … and one absent
        path.unlink()
    results = [tmp_path / f"{i}.json" for i in range(3)]
    processes = [
        context.Process(target=start_together, args=(barrier, corpus, cache_dir, result))
        for result in results
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    outcomes = [json.loads(result.read_text()) for result in results]
    assert all(outcome["tokens"] == outcomes[0]["tokens"] for outcome in outcomes)
    assert all(outcome["model"] == outcomes[0]["model"] for outcome in outcomes)
    messages: list[str] = []
    data = build(corpus, cache_dir, messages.append)
    assert messages == []
    assert data.train.tokens.tolist() + data.validation.tokens.tolist() == outcomes[0]["tokens"]
    assert len(cached(cache_dir)) == 6


def test_a_cache_that_cannot_be_written_is_refused(corpus: Files, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(UserError, match=r"cache_dir=.*file/cache cannot be written \(.+\); give another"):
        build(corpus, file / "cache")


def test_a_cache_that_cannot_be_read_is_refused(corpus: Files, tmp_path: Path) -> None:
    build(corpus, tmp_path)
    description = next(tmp_path.rglob("*.npy.json"))
    description.unlink()
    description.mkdir()
    with pytest.raises(UserError, match=r"cannot be read .*; mend its permissions"):
        build(corpus, tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def fill(file: object) -> cache.Facts:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cache_dir=.* is full; make room"):
        cache.cached_file(tmp_path, "thing.bin", {}, fill, ignore)


@pytest.mark.slow
def test_a_warm_start_needs_no_datasets_and_no_write(corpus: Files, tmp_path: Path) -> None:
    build(corpus, tmp_path)
    program = f"""
import sys, pathlib
import rsotrain.data.order, rsotrain.data.sequences
assert "sentencepiece" not in sys.modules and "datasets" not in sys.modules
from rsotrain.config.schema import FilesDataConfig, TrainedTokenizerConfig
from rsotrain.data.build import build_data
data = build_data(
    FilesDataConfig("files", path={str(corpus[0])!r}, validation_path={str(corpus[1])!r}),
    TrainedTokenizerConfig("trained", vocab_size=300),
    seq_len={SEQ_LEN}, cache_dir=pathlib.Path({str(tmp_path)!r}), notify=print)
assert not [name for name in ("datasets", "pyarrow", "pandas", "transformers") if name in sys.modules]
print(len(data.train))
"""
    before = cached(tmp_path)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert int(run.stdout) > 0
    assert cached(tmp_path) == before


# --- bad input -------------------------------------------------------------------------------------

BAD_FILES = {
    "empty": (b"", "is empty; leave it out"),
    "blank": (b"\n  \n", "has no documents; give another"),
    "only empty texts": (b'{"text": ""}\n', "has no documents; give another"),
    "unclosed": (GOOD + b'{"text": "a"\n', "line 21 is not valid JSON .*; write one object a line"),
    "pretty-printed": (b'[\n{"text": "a"}\n]', "line 1 is not valid JSON .*; write one object a line"),
    "array": (b'[{"text": "a"}]', "line 1 is not a JSON object; write one object a line"),
    "huge number": (b'{"text": ' + b"1" * 5000 + b"}", "line 1 has a value of type int in the field 'text'"),
    "deep": (b"[" * 200_000, "line 1 is nested too deeply; leave such fields out"),
    "latin-1": (GOOD + '{"text": "café"}\n'.encode("latin-1"), "line 21 is not UTF-8; convert the file"),
    "surrogate": (b'{"text": "a\\ud800"}\n', "line 1 holds half a surrogate pair"),
    "other field": (
        b'{"url": 1, "body": "a"}\n',
        r"line 1 has no field 'text' \(its fields: body, url\); give the right one with data.text_field=",
    ),
    "number": (
        GOOD + b'{"text": 3}\n',
        "line 21 has a value of type int in the field 'text'; make it a string",
    ),
    "null": (b'{"text": null}\n', "line 1 has a value of type NoneType in the field 'text'"),
    "cut gzip": (
        gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))[:-200],
        "is not a whole gzip file .*; copy it again",
    ),
    "damaged gzip": (gzip.compress(GOOD)[:-8] + bytes(8), "is not a whole gzip file .*; copy it again"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_file_is_one_sentence_that_names_it(
    name: str, which: int, corpus: Files, tmp_path: Path
) -> None:
    content, sentence = BAD_FILES[name]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    files = (bad, corpus[1]) if which == 0 else (corpus[0], bad)
    with pytest.raises(UserError, match=f"{re.escape(str(bad))}.* {sentence}") as caught:
        build(files, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not [name for name in cached(tmp_path / "cache") if name.startswith("tmp")]


def test_a_missing_file_and_an_empty_folder_are_one_sentence(corpus: Files, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, sentence in ((tmp_path / "nothing.jsonl", "is neither a file"), (empty, "holds no data files")):
        for files in ((path, corpus[1]), (corpus[0], path)):
            with pytest.raises(UserError, match=f"path={re.escape(str(path))} {sentence}"):
                build(files, tmp_path / "cache")


def test_a_text_shorter_than_a_sequence_names_the_file(corpus: Files, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(UserError, match=rf"data file {re.escape(str(short))} has \d tokens.*seq_len=16"):
        build((corpus[0], short), tmp_path / "cache")


def test_the_text_field_can_be_chosen(corpus: Files, tmp_path: Path) -> None:
    renamed = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    for source, copy in zip(corpus, renamed, strict=True):
        copy.write_bytes(source.read_bytes().replace(b'"text"', b'"body"'))
    plain = build(corpus, tmp_path / "cache")
    data = build(renamed, tmp_path / "cache", text_field="body")
    assert data.train.tokens.tolist() == plain.train.tokens.tolist()
