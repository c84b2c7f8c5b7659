"""Files that are built once and kept: whole or absent, also after a crash, and with many builders at once.

A cached file ``x.npy`` has a description ``x.npy.json`` beside it with its size, its SHA-256 and whatever
facts its builder returned. Both are written under another name, forced to the disk and renamed, the
description last: a file without a description that fits is not whole. The name is a key of everything
that determines the content, so two processes that build the same file at once write the same bytes and
it does not matter whose stays; a reader that has the older one open keeps it.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rsotrain.errors import UserError

FORMAT = 1  # raise it when what a cached file means changes
ABANDONED_SECONDS = 24 * 3600
MAX_DESCRIPTION_BYTES = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)

Facts = dict[str, Any]  # JSON-serialisable


class BrokenFileError(Exception):
    """A cached file is not what its description says; the message says how."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_file(
    cache_dir: Path,
    kind: str,
    settings: Facts,
    build: Callable[[BinaryIO], Facts],
    notify: Callable[[str], None],
    check: Callable[[Path, Facts], object] | None = None,
) -> tuple[Path, Facts]:
    """The whole file that ``settings`` stand for, and its facts.

    It is ``cache_dir/<folder of kind>/<key of settings><suffix of kind>``, for a ``kind`` such as
    "tokens.npy". ``build`` writes the content to an open file and returns the facts; it runs only when
    the file is absent, or broken, which ``notify`` is told in one line. Opening reads the file once.
    ``check`` reads it, too, and raises BrokenFileError where what is in it makes no sense: a checksum that
    fits says only that nobody has changed one of the two. Raises UserError when the cache cannot be read or
    written, and whatever ``build`` raises.
    """
    settings = {"format": FORMAT, **settings}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir / Path(kind).stem / (key + Path(kind).suffix)
    try:
        if (facts := read_facts(path, settings)) is not None:
            if check is not None:
                check(path, facts)
            return path, facts
    except BrokenFileError as error:
        notify(f"the cached file {path} is broken ({error}); building it again")
    except OSError as error:
        raise UserError(
            f"the cached file {path} cannot be read ({error.strerror});"
            " mend its permissions or give another cache with cache_dir=…"
        ) from error
    with temporary_folder(cache_dir) as folder:
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path.parent} is in the way of the cache ({error.strerror}); remove it"
            ) from error
        new = folder / path.name
        with new.open("w+b") as file:
            facts = build(file)
            _to_disk(file)
        description = {
            "size": new.stat().st_size,
            "sha256": hash_file(new),
            "facts": facts,
            "settings": settings,
        }
        new_description = _description_path(new)
        with new_description.open("wb") as file:
            file.write(json.dumps(description, indent=1).encode())
            _to_disk(file)
        for made, place in ((new, path), (new_description, _description_path(path))):
            try:
                made.replace(place)  # a link there goes, and what it leads to stays
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise UserError(
                    f"{place} is in the way of the cache ({error.strerror}); remove it"
                ) from error
    return path, facts


def read_facts(path: Path, settings: Facts) -> Facts | None:
    """The facts of the whole cached file that ``settings`` stand for; None when there is none.

    Raises BrokenFileError when the file or its description is damaged or another's, OSError where either
    cannot be read.
    """
    description_path = _description_path(path)
    if not path.exists() and not description_path.exists():
        return None
    try:
        _check_kind(description_path)
        if description_path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise ValueError("no description is as long")
        description = json.loads(description_path.read_bytes())
        size, sha256, facts = description["size"], description["sha256"], description["facts"]
        whose = description["settings"]
    except FileNotFoundError as error:
        raise BrokenFileError("its description is missing") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BrokenFileError("its description is damaged") from error
    if not isinstance(facts, dict):
        raise BrokenFileError("its description is damaged")
    if whose != json.loads(json.dumps(settings)):
        raise BrokenFileError("its description is that of another")
    if not path.exists():
        raise BrokenFileError("it is missing")
    _check_kind(path)
    if path.stat().st_size != size:
        raise BrokenFileError(f"it has {path.stat().st_size} bytes instead of {size}")
    if hash_file(path) != sha256:
        raise BrokenFileError("its checksum does not fit")
    return facts


def _check_kind(path: Path) -> None:
    """Raise BrokenFileError for a pipe or a device, which would be waited for, or has no end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BrokenFileError("something that is no file has its name")


@contextmanager
def temporary_folder(cache_dir: Path) -> Iterator[Path]:
    """A folder on the cache's own file system that goes at the end.

    What dead processes left behind goes after a day. Raises UserError when the folder cannot be made or
    written, and when the disk fills up.
    """
    parent = cache_dir / "tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(dir=parent))
    except (OSError, ValueError) as error:  # the latter for a null character in the name
        raise _unwritable(cache_dir, error) from error
    try:
        yield folder
    except OSError as error:
        raise _unwritable(cache_dir, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(cache_dir: Path, error: OSError | ValueError) -> UserError:
    if isinstance(error, OSError) and error.errno in FULL:
        return UserError(f"cache_dir={cache_dir} is full; make room or give another with cache_dir=…")
    said = getattr(error, "strerror", None) or error
    return UserError(f"cache_dir={cache_dir} cannot be written ({said}); give another with cache_dir=…")


def _remove_abandoned(parent: Path) -> None:
    oldest = time.time() - ABANDONED_SECONDS
    for folder in parent.iterdir():
        with suppress(FileNotFoundError):  # its owner is just removing it
            times = [entry.lstat().st_mtime for entry in [folder, *folder.rglob("*")]]
            if max(times) < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _description_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
