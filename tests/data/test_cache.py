"""A cached file that is damaged, hostile or cannot be written: built again, or one sentence."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsotrain.config.data import FilesDataConfig, Packing, TrainedTokenizerConfig
from rsotrain.data import cache, fingerprint
from rsotrain.data.build import Data, build_data
from rsotrain.data.progress import documents_with_bar
from rsotrain.data.sources import open_corpora
from rsotrain.errors import UserError

Files = tuple[Path, Path]
KINDS = ("tokens/*.npy", "spans/*.npy", "tokenizers/*.model")
EACH_KIND = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


def ignore(_: str) -> None:
    """For a test that is not about the messages."""


def build(files: Files, cache_dir: Path, notify: Callable[[str], None] = ignore) -> Data:
    train, validation = map(str, files)
    data = FilesDataConfig("files", path=train, validation_path=validation, packing=Packing.padded)
    tokenizer = TrainedTokenizerConfig("trained", vocab_size=300)
    return build_data(data, tokenizer, seq_len=16, cache_dir=cache_dir, notify=notify)


def description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def describe(path: Path, content: bytes, **changes: Any) -> None:
    """Put ``content`` in the place of a cached file, and let its description bear it out."""
    path.write_bytes(content)
    described = json.loads(description(path).read_text())
    described |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} | changes
    description(path).write_text(json.dumps(described))


def array(values: Any, dtype: Any = None) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(values, dtype), allow_pickle=True)
    return out.getvalue()


def check_rebuilt(files: Files, folder: Path, damage: Callable[[Path], None], kind: str) -> None:
    """What is damaged is told in one line and built again, bytes and all."""
    before = build(files, folder).train.batch(np.arange(9))
    path = max(folder.glob(kind), key=lambda path: path.stat().st_size)
    content, described = path.read_bytes(), description(path).read_bytes()
    damage(path)
    told: list[str] = []
    after = build(files, folder, told.append)
    broken = [line for line in told if "is broken" in line]
    assert len(broken) == 1
    assert broken[0].isprintable()
    assert str(path) in broken[0]
    assert (path.read_bytes(), description(path).read_bytes()) == (content, described)
    assert not path.is_symlink()
    for one, other in zip(after.train.batch(np.arange(9)), before, strict=True):
        assert one.equal(other)


def put_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_link(target: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return put


def put_link_to_another(path: Path) -> None:
    other = path.with_name("another")
    other.write_bytes(b"precious")
    put_link("another")(path)


INSTEAD = {
    "a pipe": put_pipe,
    "a device": put_link("/dev/zero"),
    "a link to nothing": put_link("nothing"),
    "a link to itself, as it were": put_link("../tokens/nothing"),
    "a link to another file": put_link_to_another,
}


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("which", [Path, description])
@pytest.mark.parametrize("what", INSTEAD)
def test_something_else_in_the_place_of_a_file_is_replaced(
    what: str, which: Callable[[Path], Path], kind: str, corpus: Files, tmp_path: Path
) -> None:
    check_rebuilt(corpus, tmp_path, lambda path: INSTEAD[what](which(path)), kind)
    for other in tmp_path.rglob("another"):
        assert other.read_bytes() == b"precious"  # what the link led to is not written through


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda _: [1],
    "a number": lambda _: 3,
    "no size": lambda d: {k: v for k, v in d.items() if k != "size"},
    "a size of text": lambda d: d | {"size": str(d["size"])},
    "a huge size": lambda d: d | {"size": 10**30},
    "a checksum of another type": lambda d: d | {"sha256": [d["sha256"]]},
    "no facts": lambda d: d | {"facts": None},
    "facts of another type": lambda d: d | {"facts": "text"},
    "other settings": lambda d: d | {"settings": d["settings"] | {"format": 0}},
    "no settings": lambda d: d | {"settings": None},
}
CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "bytes at random": bytes(range(256)) * 100,
    "deep": b"[" * 10**5,
    "a long number": b"1" * 10**5,
    "not UTF-8": b'{"size": "\xff"}',
    "too long": b" " * 2**21,
}


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("what", [*DESCRIPTIONS, *CONTENTS])
def test_a_description_of_something_else_is_not_believed(
    what: str, kind: str, corpus: Files, tmp_path: Path
) -> None:
    def damage(path: Path) -> None:
        file = description(path)
        if what in CONTENTS:
            file.write_bytes(CONTENTS[what])
        else:
            file.write_text(json.dumps(DESCRIPTIONS[what](json.loads(file.read_text()))))

    check_rebuilt(corpus, tmp_path, damage, kind)


TOKENS: dict[str, Callable[[np.ndarray], tuple[bytes, dict[str, Any]]]] = {
    "no array": lambda ids: (b"text", {}),
    "a header alone": lambda ids: (array(ids)[:80], {}),
    "a header that is no Python": lambda ids: (array(ids).replace(b"descr", b"{{{{{", 1), {}),
    "fewer": lambda ids: (array(ids[:-1]), {}),
    "other numbers": lambda ids: (array(ids, np.float32), {}),
    "wider numbers": lambda ids: (array(ids, np.int64), {}),
    "two axes": lambda ids: (array([ids, ids]), {}),
    "objects": lambda ids: (array([None, 1], object), {}),
    "a token beyond the vocabulary": lambda ids: (array([*ids[:-1], 300], np.uint16), {}),
    "facts without counts": lambda ids: (array(ids), {"facts": {}}),
    "counts of another type": lambda ids: (
        array(ids),
        {"facts": {"num_tokens": float(len(ids)), "num_documents": "3", "num_bytes": None}},
    ),
    "more documents than tokens": lambda ids: (
        array(ids),
        {"facts": {"num_tokens": len(ids), "num_documents": len(ids), "num_bytes": 9}},
    ),
}
SPANS: dict[str, Callable[[np.ndarray], bytes]] = {
    "one axis": lambda spans: array(spans.reshape(-1)),
    "fewer": lambda spans: array(spans[:-1]),
    "other numbers": lambda spans: array(spans, np.int32),
    "before the first": lambda spans: array(spans - 2),
    "behind the last": lambda spans: array(spans + 10),
    "in another order": lambda spans: array(spans[::-1]),
    "huge": lambda spans: array(spans * 2**40),
}


@pytest.mark.parametrize("what", TOKENS)
def test_tokens_that_make_no_sense_are_made_again_though_their_checksum_fits(
    what: str, corpus: Files, tmp_path: Path
) -> None:
    def damage(path: Path) -> None:
        content, changes = TOKENS[what](np.load(path))
        describe(path, content, **changes)

    check_rebuilt(corpus, tmp_path, damage, "tokens/*.npy")


@pytest.mark.parametrize("what", SPANS)
def test_spans_that_make_no_sense_are_made_again(what: str, corpus: Files, tmp_path: Path) -> None:
    check_rebuilt(corpus, tmp_path, lambda path: describe(path, SPANS[what](np.load(path))), "spans/*.npy")


@pytest.mark.parametrize("content", [b"", b"text", bytes(5000)])
def test_a_tokenizer_that_is_none_is_trained_again(content: bytes, corpus: Files, tmp_path: Path) -> None:
    check_rebuilt(corpus, tmp_path, lambda path: describe(path, content), "tokenizers/*.model")


def test_a_pickle_in_the_place_of_tokens_is_not_executed(corpus: Files, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    hostile = array([Hostile()], object)
    check_rebuilt(corpus, tmp_path / "cache", lambda path: describe(path, hostile), "tokens/*.npy")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_the_place_of_a_file_is_named(kind: str, corpus: Files, tmp_path: Path) -> None:
    build(corpus, tmp_path)
    path = max(tmp_path.glob(kind), key=lambda path: path.stat().st_size)
    size = path.stat().st_size
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path.name} is in the way of the cache \(.+\); remove it"):
        build(corpus, tmp_path)
    path.rmdir()
    build(corpus, tmp_path)
    assert path.stat().st_size == size


def test_the_remembered_hash_of_a_large_file_is_checked(
    corpus: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "REMEMBERED_BYTES", 0)
    before = build(corpus, tmp_path).fingerprint
    (path, *_) = sorted(tmp_path.glob("hashes/*.sha256"))
    describe(path, path.read_bytes(), facts={"sha256": 3})
    assert build(corpus, tmp_path).fingerprint == before
    assert isinstance(json.loads(description(path).read_text())["facts"]["sha256"], str)


# --- a cache that cannot be written ----------------------------------------------------------------


def test_a_disk_that_ends_in_the_middle_of_a_file_is_one_sentence(corpus: Files, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: some bytes are written, then there is an error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cache_dir=.* cannot be written \(File too large\)"):
            build(corpus, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "tmp").iterdir())
    build(corpus, tmp_path)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (28, r"is full; make room or give another with cache_dir="),
        (122, r"is full; make room"),  # a quota
        (5, r"cannot be written \(Input/output error\); give another"),
        (30, r"cannot be written \(Read-only file system\)"),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_errors_of_the_disk_while_a_file_is_made_are_one_sentence(
    step: str, number: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.os if step == "fsync" else Path, step, fail)
    if step == "replace" and number not in cache.FULL:
        sentence = r"is in the way of the cache \(.+\); remove it"
    with pytest.raises(UserError, match=sentence):
        cache.cached_file(tmp_path, "thing.bin", {}, lambda file: {"n": file.write(b"ab")}, ignore)
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["/dev/null/cache", "x" * 3000, "a\0b"])
def test_what_is_no_folder_for_a_cache_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be (read|written) \(.+\).* give another .*cache_dir="):
        cache.cached_file(tmp_path / name, "thing.bin", {}, lambda file: {}, ignore)


@pytest.mark.slow
def test_processes_that_build_at_once_do_not_mind_that_others_are_killed(
    corpus: Files, tmp_path: Path
) -> None:
    """Two build the same cache, one is killed in the middle; the other's files are whole."""
    program = f"""
import sys, time
from pathlib import Path
from rsotrain.config.data import FilesDataConfig, TrainedTokenizerConfig
from rsotrain.data.build import build_data
def say(message):
    print(message, flush=True)
    if sys.argv[1] == "stuck" and "tokenising" in message:
        time.sleep(100)
data = FilesDataConfig("files", path={str(corpus[0])!r}, validation_path={str(corpus[1])!r})
build_data(data, TrainedTokenizerConfig("t", vocab_size=300), seq_len=16, cache_dir=Path({str(tmp_path)!r}),
           notify=say)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen([*command, "stuck"], stdout=subprocess.PIPE, text=True) as stuck:
        assert stuck.stdout is not None
        while "tokenising" not in stuck.stdout.readline():
            pass
        other = subprocess.run([*command, ""], capture_output=True, text=True, check=False, timeout=100)
        assert (other.returncode, other.stderr) == (0, "")
        assert "training" not in other.stdout  # which the first had done
        stuck.kill()
    told: list[str] = []
    data = FilesDataConfig("files", path=str(corpus[0]), validation_path=str(corpus[1]))
    tokenizer = TrainedTokenizerConfig("t", vocab_size=300)
    build_data(data, tokenizer, seq_len=16, cache_dir=tmp_path, notify=told.append)
    assert told == []


# --- the progress bar ------------------------------------------------------------------------------


class Closed(io.StringIO):
    """A terminal that is no longer there."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("screen", [Closed(), None])
def test_a_terminal_that_is_closed_does_not_end_the_reading(
    screen: Any, corpus: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FilesDataConfig("files", path=str(corpus[0]), validation_path=str(corpus[1]))
    train, _ = open_corpora(data, tmp_path)
    monkeypatch.setattr(sys, "stderr", screen)
    with documents_with_bar(train, ignore) as documents:
        assert len(list(documents)) == 300
