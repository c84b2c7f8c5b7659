"""Damaged data files: cut short at every place, bytes flipped or overwritten, and what is of another type."""

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

TEXTS = [f"document {i}: the {'ship ' * (i % 5)}é🙂\nsailed" for i in range(12)]
JSON_LINES = "".join(
    json.dumps({"id": i, "doc": {"text": text}, "text": text}, ensure_ascii=i % 2 == 0) + "\n"
    for i, text in enumerate(TEXTS)
).encode()
HUGE = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x40")  # lengths and places in a file


def _table(kind: pa.DataType) -> pa.Table:
    text = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(TEXTS, kind)
    doc = pa.StructArray.from_arrays([pa.array(TEXTS)], ["text"])
    return pa.table({"id": range(len(TEXTS)), "doc": doc, "text": text})


def _parquet(kind: pa.DataType, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(_table(kind), out, row_group_size=5, **options)
    return out.getvalue()


def _arrow(kind: pa.DataType, new: Callable[..., Any], compression: str | None) -> bytes:
    out = io.BytesIO()
    table = _table(kind)
    with new(out, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=5)
    return out.getvalue()


def zstd(content: bytes, *, frames: int = 1, skippable: bool = False) -> bytes:
    """Frames with checksums, each after a skippable one as pzstd writes them."""
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    size = max(1, -(-len(content) // frames))
    parts = [compressor.compress(content[i : i + size]) for i in range(0, max(1, len(content)), size)]
    # magic number, length of what is to be skipped, and there the length of the frame
    head = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little")
    return b"".join((head + len(part).to_bytes(4, "little") if skippable else b"") + part for part in parts)


STRING, VIEW, DICTIONARY = pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())

# Name of the file -> its content; all hold TEXTS under "text" and under "doc.text".
WHOLE: dict[str, bytes] = {
    "plain.jsonl": JSON_LINES,
    "a.jsonl.gz": gzip.compress(JSON_LINES, mtime=0),
    "members.jsonl.gz": gzip.compress(JSON_LINES[:500], mtime=0) + gzip.compress(JSON_LINES[500:], mtime=0),
    "a.jsonl.xz": lzma.compress(JSON_LINES),
    "a.jsonl.zst": zstd(JSON_LINES),
    "pzstd.jsonl.zst": zstd(JSON_LINES, frames=3, skippable=True),
    "a.parquet": _parquet(STRING),
    "dictionary.parquet": _parquet(DICTIONARY, compression="zstd", write_page_checksum=True),
    "pages.parquet": _parquet(VIEW, compression="none", data_page_version="2.0", use_dictionary=False),
    "file.arrow": _arrow(STRING, pa.ipc.new_file, None),
    "dictionary.arrow": _arrow(DICTIONARY, pa.ipc.new_file, None),
    "view.arrow": _arrow(VIEW, pa.ipc.new_file, "lz4"),
    "stream.arrow": _arrow(pa.large_string(), pa.ipc.new_stream, None),
    "view_stream.arrow": _arrow(VIEW, pa.ipc.new_stream, None),
    "dictionary_stream.arrow": _arrow(DICTIONARY, pa.ipc.new_stream, "zstd"),
}
# A checksum covers the text, so damage is noticed or does not matter.
CHECKED = ("a.jsonl.gz", "members.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "pzstd.jsonl.zst")


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(what was done, what came of it) for every byte of a file."""
    for place in range(len(content)):
        yield f"cut at {place}", content[:place]
    for place, byte in enumerate(content):
        for mask in (0x01, 0x80, 0xFF):
            flipped = bytes([byte ^ mask])
            yield f"byte {place} ^ {mask:#x}", content[:place] + flipped + content[place + 1 :]
        yield f"without byte {place}", content[:place] + content[place + 1 :]
        yield f"a zero before byte {place}", content[:place] + b"\0" + content[place:]
    for place in range(0, len(content) - 4):
        for value in HUGE:
            yield f"{value.hex()} at {place}", content[:place] + value + content[place + 4 :]
    for first, second in ((0, 1 / 2), (1 / 3, 2 / 3), (1 / 2, 1)):
        hole = slice(int(len(content) * first), int(len(content) * second))
        yield f"zeros in {hole}", content[: hole.start] + bytes(hole.stop - hole.start) + content[hole.stop :]
    yield "twice", content * 2
