"""Damaged and hostile data files: one sentence each, or the right text; never a traceback, never a hang."""

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from helpers.corpora import json_lines
from helpers.damage import CHECKED, JSON_LINES, TEXTS, WHOLE, damaged, zstd

from rsotrain.config.data import SampleBy
from rsotrain.data import readers
from rsotrain.data.decompression import open_decompressed
from rsotrain.data.documents import Corpus, TextField
from rsotrain.data.readers import FileShard
from rsotrain.data.rows import BadRow, Position, limited_lines
from rsotrain.errors import UserError

SAMPLED = 300  # cases of each format in the quick test


def read(path: Path, field: str = "text", max_bad_rows: int = 0) -> list[str]:
    corpus = Corpus("x", (FileShard(path, (field,)),), TextField(field), "", max_bad_rows=max_bad_rows)
    return [document.text for document in corpus.documents(lambda _: None)]


def attempt(path: Path, field: str = "text", max_bad_rows: int = 0) -> tuple[list[str], str | None]:
    """The texts, or the sentence that says why there are none."""
    try:
        return read(path, field, max_bad_rows), None
    except UserError as error:
        return [], str(error)


def check(path: Path, field: str, what: str, content: bytes) -> None:
    """Read a damaged file: a sentence, or texts, and what is covered by checksums comes out right."""
    path.write_bytes(content)
    texts, sentence = attempt(path, field)
    if sentence is not None:
        assert sentence.isprintable(), what
        assert len(sentence) < 700, what
        assert path.name in sentence, what
    elif path.name in CHECKED:
        nothing = content == b"" or what == "cut at 12"  # the latter is pzstd's first frame, whole
        assert texts in (TEXTS, TEXTS * 2) or (nothing and texts == []), what


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_holds_its_texts(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(WHOLE[name])
    for field in ("text", "doc.text"):
        assert read(path, field) == TEXTS
        rows = list(FileShard(path, (field,)).rows(first=3, step=4))
        assert [number for number, _ in rows] == [3, 7, 11]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_sample_of_damage_to_each_format(name: str, tmp_path: Path) -> None:
    cases = list(damaged(WHOLE[name]))
    for i, (what, content) in enumerate(random.Random(name).sample(cases, SAMPLED)):
        check(tmp_path / name, ("text", "doc.text")[i % 2], what, content)


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE)
def test_all_damage_to_each_format(name: str, tmp_path: Path) -> None:
    for i, (what, content) in enumerate(damaged(WHOLE[name])):
        check(tmp_path / name, ("text", "doc.text")[i % 2], what, content)


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_of_one_format_under_the_name_of_another(name: str, tmp_path: Path) -> None:
    right = name.split(".", 1)[1]
    for other in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "parquet.gz"):
        path = tmp_path / f"x.{other}"
        path.write_bytes(WHOLE[name])
        if right.split(".")[0] == other.split(".")[0]:
            assert read(path) == TEXTS  # the first bytes tell the compression
        else:
            with pytest.raises(UserError, match=rf"x\.{other}.*") as caught:
                read(path)
            assert str(caught.value).isprintable()


@pytest.mark.parametrize("sample_by", SampleBy)
def test_damaged_text_files(sample_by: SampleBy, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "one é\ntwo\n\nthree 🙂\n".encode()
    for _, content in damaged(text):
        path.write_bytes(content)
        for _, row in FileShard(path, ("text",), sample_by).rows():
            assert isinstance(row, BadRow) or isinstance(row["text"], str)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_an_arrow_file_that_is_cut_while_it_is_read_gets_a_sentence(kind: str, tmp_path: Path) -> None:
    """It is mapped into memory: to touch what is gone would end the process with SIGBUS."""
    import pyarrow as pa

    path, rows = tmp_path / "a.arrow", 3000
    table = pa.table({"text": [f"{i} " + "x" * 2000 for i in range(rows)]})
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    whole = path.stat().st_size
    corpus = Corpus("x", (FileShard(path, ("text",)),), TextField("text"), "")
    documents = corpus.documents(lambda _: None)
    assert next(documents).text.startswith("0 x")
    os.truncate(path, whole // 2)
    with pytest.raises(
        UserError, match=rf"a\.arrow.* cut from {whole:,} to {whole // 2:,} bytes while it was"
    ):
        list(documents)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow", "a.jsonl.gz", "plain.jsonl"])
def test_bad_rows_may_be_skipped_but_not_what_makes_no_sense(name: str, tmp_path: Path) -> None:
    """However many are allowed, the reading of a damaged file ends."""
    path = tmp_path / name
    for what, content in random.Random(1).sample(list(damaged(WHOLE[name])), 50):
        path.write_bytes(content)
        texts, sentence = attempt(path, max_bad_rows=10**6)
        assert len(texts) <= 2 * len(TEXTS), what
        assert sentence is None or sentence.isprintable(), what


# --- lines of JSON ---------------------------------------------------------------------------------

LINES = {
    "an integer of 5,000 digits in another field": (b'{"id": ' + b"1" * 5000 + b', "text": "a"}', "a"),
    "one with a sign and an exponent": (b'{"id": [-' + b"1" * 9999 + b', 1e999999], "text": "a"}', "a"),
    "a key that is there twice": (b'{"text": "a", "text": "b"}', "b"),
    "a byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "a"),
    "numbers that JSON has not": (b'{"id": [NaN, Infinity], "text": "a"}', "a"),
    "a null character": (b'{"text": "a\\u0000b"}', "a\0b"),
    "a literal key with a dot": (b'{"text": "a"}', "a"),
    "an integer of 5,000 digits as text": (
        b'{"text": ' + b"1" * 5000 + b"}",
        "has a value of type int in",
    ),
    "5,000 digits and no JSON": (b'{"text": ' + b"1" * 5000, r"is not valid JSON \(Expecting ',' delim"),
    "deep nesting in another field": (
        b'{"id": ' + b"[" * 10**5 + b"]" * 10**5 + b', "text": "a"}',
        "is nested too deeply; leave such fields out",
    ),
    "deep objects": (b'{"a":' * 10**5, "is nested too deeply"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8; convert the file"),
    "UTF-32": ('{"text": "a"}'.encode("utf-32"), "is not UTF-8; convert the file"),
    "null characters": (bytes(100), "is not valid JSON"),
    "an array": (b'["a"]', "is not a JSON object"),
    "a string": (b'"text"', "is not a JSON object"),
    "many fields": (
        json.dumps({f"field {i}": i for i in range(10**4)}).encode(),
        r"no field 'text' \(its fields: field 0, .* and 9980 more\)",
    ),
    "a long name": (json.dumps({"x" * 10**5: 1}).encode(), "no field 'text'"),
    "half a surrogate pair in a name": (b'{"\\ud800": 1}', r"no field 'text' \(its fields: \\ud800\)"),
}


@pytest.mark.parametrize("what", LINES)
def test_lines_are_read_or_named(what: str, tmp_path: Path) -> None:
    line, outcome = LINES[what]
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n" + b'{"text": "last"}\n')
    if len(outcome) < 5:
        assert read(path) == [outcome, "last"]
        return
    with pytest.raises(UserError, match=rf"a.jsonl: line 1 .*{outcome}") as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    if "16" not in what:  # where a line break is two bytes
        assert read(path, max_bad_rows=2) == ["last"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n", b"\n \r\n\t\n"])
def test_a_file_of_nothing_but_a_byte_order_mark_or_blank_lines_holds_no_rows(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl") == []


class Endless:
    """A line without end, and how much of it was asked for at once."""

    largest = 0

    def __init__(self, head: bytes, size: int) -> None:
        self.head, self.left = head, size

    def read(self, size: int = -1, /) -> bytes:
        raise NotImplementedError

    def readline(self, size: int = -1, /) -> bytes:
        assert size > 0
        self.largest = max(self.largest, size)
        if self.head:
            line, self.head = self.head, b""
            return line
        size = min(size, self.left)
        self.left -= size
        return b"x" * size


def test_a_line_that_is_too_long_is_never_held_whole() -> None:
    lines = Endless(b"first\n", 10**9)
    assert list(limited_lines(lines, 10**6)) == [b"first\n", None]
    assert lines.largest == 10**6 + 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_too_long_a_line_is_a_bad_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    long, rest = json_lines(["a" * 2**21]), json_lines(["b" * (2**20 - 100), "c"])
    compress = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstd}[name]
    (tmp_path / name).write_bytes(compress(long + rest))
    with pytest.raises(UserError, match=rf"{name}: line 1 is longer than 1 MiB; cut it into shorter ones"):
        read(tmp_path / name)
    assert [len(text) for text in read(tmp_path / name, max_bad_rows=1)] == [2**20 - 100, 1]


@pytest.mark.parametrize("sample_by", [SampleBy.line, SampleBy.paragraph])
def test_too_long_a_line_or_paragraph_of_text_is_a_bad_row(
    sample_by: SampleBy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "a.txt"
    lines = [b"a" * 1500, b"", b"b" * 600, b"c" * 300, b"", b"d" * 600, b"e" * 600, b"", b"f"]
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = [row for _, row in FileShard(path, ("text",), sample_by).rows()]
    found = [0 if isinstance(row, BadRow) else len(row["text"]) for row in rows]
    by_line = [0, 0, 600, 300, 0, 600, 600, 0, 1]
    assert found == ([0, 901, 0, 1] if sample_by is SampleBy.paragraph else by_line)
    assert str(rows[0]) == f"{sample_by.name} 1 is longer than 0 MiB; cut it into shorter ones"


# --- zstd ------------------------------------------------------------------------------------------


def long_window_frame(content: bytes, log: int) -> bytes:
    """As zstd --long=``log`` writes it from a pipe, not compressed (RFC 8878, 3.1.1)."""
    window = (log - 10) << 3
    block = (len(content) << 3 | 1).to_bytes(3, "little")  # the last one, raw
    return b"\x28\xb5\x2f\xfd" + bytes([0, window]) + block + content


@pytest.mark.parametrize("log", [20, 27, 28, 31])
def test_long_windows_are_decompressed(log: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(long_window_frame(JSON_LINES, log))
    assert read(path) == TEXTS


def test_a_longer_window_than_there_is_names_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(long_window_frame(JSON_LINES, 32))
    with pytest.raises(UserError, match=r"not a whole zstd file \(.*Frame requires too much memory"):
        read(path)


def test_highly_compressible_text_is_decompressed_a_little_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(bytes(2**29)))  # 16 KiB of compressed bytes
    tracemalloc.start()
    with open_decompressed(path, Position()) as lines:
        while lines.read(2**20):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28
