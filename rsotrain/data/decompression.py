"""Plain bytes from files that are compressed with gzip, xz or zstd, or not at all."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any

from rsotrain.data.rows import Damaged, Lines, Position, reason

GZIP, XZ, ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; pzstd begins with such a frame
ZSTD_WINDOW_BYTES = 2**31  # of zstd --long=31, the longest there is
ZSTD_CHUNK_BYTES = 1024  # compressed; of the most repetitive text there are 32 MiB in these
BUFFER_BYTES = 2**17


def compression(path: Path) -> str | None:
    """What a file is compressed with by its first bytes, whatever its name says."""
    with path.open("rb") as file:
        return _compression(file.read(6))


def _compression(magic: bytes) -> str | None:
    if magic.startswith(GZIP):
        return "gzip"
    if magic.startswith(XZ):
        return "xz"
    skippable = magic[1:4] == ZSTD_SKIPPABLE and magic[0] & 0xF0 == 0x50
    return "zstd" if magic.startswith(ZSTD) or skippable else None


@contextmanager
def open_decompressed(path: Path, position: Position) -> Iterator[Lines]:
    """The decompressed bytes of a file. Raises Damaged when they are read and make no sense."""
    with path.open("rb") as raw:
        kind = _compression(raw.read(6))
        raw.seek(0)
        position.file = raw
        match kind:
            case "gzip":
                with _damage("gzip file"), gzip.open(raw) as file:
                    yield file
            case "xz":
                with _damage("xz file"), lzma.open(raw) as file:
                    yield file
            case "zstd":
                with _damage("zstd file"), BufferedReader(_ZstdReader(raw), BUFFER_BYTES) as file:
                    yield file
            case _:
                yield raw


@contextmanager
def _damage(kind: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise Damaged(f"{kind} ({reason(error)})") from error


class _ZstdReader(RawIOBase):
    """One frame after another. ``zstandard``'s own reader takes a file that is cut short for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._frame: Any = None  # the frame that is being read
        self._compressed = b""  # what follows it
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._compressed or self._file.read(ZSTD_CHUNK_BYTES)
            self._compressed = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._error as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
