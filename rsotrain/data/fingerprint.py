"""What tells one set of data files from another."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rsotrain.data.cache import BrokenFileError, cached_file, hash_file
from rsotrain.data.finding import shown
from rsotrain.data.rows import reason
from rsotrain.errors import UserError

REMEMBERED_BYTES = 64 * 2**20  # hashing less is quicker than asking whether it has been done
END_BYTES = 2**20


def files_fingerprint(files: Sequence[Path], cache_dir: Path, *, whole: bool) -> str:
    """SHA-256 that stands for the files' bytes in order, whatever the files are called.

    ``whole``: of all the bytes; that of a large file is remembered in ``cache_dir`` for as long as size,
    times and inode stay. Otherwise of each file's size and its first and last MiB, for corpora that are
    never read as a whole. Raises UserError when a file cannot be read.
    """
    hashes = []
    for file in files:
        try:
            hashes.append(_hash(file, cache_dir) if whole else _hash_ends(file))
        except OSError as error:
            raise UserError(f"the data file {shown(file)} cannot be read ({reason(error)})") from error
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _hash(file: Path, cache_dir: Path) -> str:
    stat = file.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return hash_file(file)
    # The time of change cannot be set by hand: content that changes unseen would need a new clock.
    what = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    def build(out: object) -> dict[str, str]:
        return {"sha256": hash_file(file)}

    def check(_: Path, facts: dict[str, object]) -> None:
        if not isinstance(facts.get("sha256"), str):
            raise BrokenFileError("its description is damaged")

    settings = {"file": json.dumps(what)}
    _, facts = cached_file(cache_dir, "hashes.sha256", settings, build, lambda _: None, check)
    return facts["sha256"]


def _hash_ends(file: Path) -> str:
    with file.open("rb") as opened:
        head = opened.read(END_BYTES)
        size = file.stat().st_size
        opened.seek(max(0, size - END_BYTES))
        return hashlib.sha256(f"{size} ".encode() + head + opened.read()).hexdigest()
