"""What a file name, a folder or a glob stands for: data files, every one of which must be there.

Nothing that looks like data is passed over in silence: a link to nothing, a pipe, a folder that cannot be
listed, a kind that is not read.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice, pairwise
from pathlib import Path

from rsotrain.errors import UserError, require

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md")
TABLE_SUFFIXES = (".parquet", ".arrow")
KNOWN_SUFFIXES = JSON_SUFFIXES + TEXT_SUFFIXES + TABLE_SUFFIXES
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
OTHER_COMPRESSION_SUFFIXES = (
    ".bz2",
    ".lz4",
    ".br",
    ".lzma",
    ".zip",
    ".7z",
    ".z",
    ".gzip",
    ".zstd",
    ".snappy",
)
MAX_SHOWN = 300  # characters of a path in a message
MAX_BRACES, MAX_ALTERNATIVES = 64, 10_000  # of {a,b} in a glob

Stamp = tuple[int, int]  # bytes, time of the last change in ns


def data_suffix(path: Path) -> str:
    """``.json`` of ``a.json.gz``; the last suffix that is not a compression's, in lower case."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in COMPRESSION_SUFFIXES


def shown(name: Path | str) -> str:
    """A name for a message: on one line, not too long, and with whatever is no text in it escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}…{text[-MAX_SHOWN // 2 :]}"


def find_files(path: str, key: str) -> list[Path]:
    """The data files that a file name, a folder or a glob stand for, sorted.

    Of a folder all that is not hidden, links to folders followed. In a glob, ``**`` is any number of folders
    and ``{a,b}`` either; what exists under the very name that is given is that, brackets and all. Raises
    UserError, with ``key`` in the sentence, where there is none, or one that is of an unknown kind or
    cannot be read.
    """
    require(bool(path), f"{key} is empty; give a file, a folder or a glob")
    name = shown(Path(path))
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"{key}={name} is no path ({error})") from error
    if not _exists(given, key):
        files = _glob(given, name, key)
    elif _is_folder(given, key):
        files = _data_files(given, f"{key}={name}", key)
    else:
        files = [given]
    num_bytes = 0
    for file in files:
        require(
            data_suffix(file) in KNOWN_SUFFIXES,
            f"{key}: {shown(file)} is of no known kind; its name should end in one of"
            f" {', '.join(KNOWN_SUFFIXES)} (and {', '.join(COMPRESSION_SUFFIXES)} where compressed)",
        )
        size, _ = file_stamp(file, key)
        # a program that writes many files leaves some of plain text empty; others are never without a byte
        nothing = len(files) > 1 and data_suffix(file) not in TABLE_SUFFIXES and not is_compressed(file)
        require(size > 0 or nothing, f"{key}: {shown(file)} is empty; leave it out")
        num_bytes += size
    require(num_bytes > 0, f"{key}={name}: all {len(files)} files are empty; give others")
    return files


def file_stamp(file: Path, key: str = "the data") -> Stamp:
    """What tells whether a file has changed. Raises UserError for what is no file, or not there."""
    found = _stat(file, key)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(
            f"{key}: {shown(file)} is {_kind(found.st_mode)}; give a file, which can be read again"
        )
    return found.st_size, found.st_mtime_ns


def folder_files(folder: Path, key: str) -> list[Path]:
    """All files in a folder and below, sorted; none that is hidden.

    Links to folders are followed, but each folder is read once. Raises UserError where something is no
    file, or leads nowhere, or a folder cannot be listed.
    """
    files = sorted(file for file in _walk(folder, key) if not _is_folder(file, key))
    for file in files:
        file_stamp(file, key)
    return files


def _data_files(folder: Path, given: str, key: str) -> list[Path]:
    files = []
    for path in sorted(_walk(folder, key)):
        compression = path.suffix.lower()
        require(
            compression not in OTHER_COMPRESSION_SUFFIXES
            or data_suffix(path.with_suffix("")) not in KNOWN_SUFFIXES,
            f"{key}: {shown(path)} is compressed with what is not read (only"
            f" {', '.join(COMPRESSION_SUFFIXES)} are); decompress it, or leave it out with a glob",
        )
        if data_suffix(path) in KNOWN_SUFFIXES and not _is_folder(path, key):
            files.append(path)
    require(bool(files), f"{given} holds no data files ({', '.join(KNOWN_SUFFIXES)}, also compressed)")
    texts = [p for p in files if data_suffix(p) in TEXT_SUFFIXES]
    require(
        not texts or len(texts) == len(files),  # most often a README beside the data
        f"{given} holds text ({shown(Path(texts[0].name)) if texts else ''}) beside JSON or tables; say which"
        f" with a glob, such as {key}='{shown(folder)}/**/*.jsonl'",
    )
    return files


def _walk(folder: Path, key: str) -> Iterator[Path]:
    """Everything below a folder that is not hidden, in no order; what several links lead to but once."""
    for each in _folders(folder, key):
        yield from (path for path in _listed(each, key) if not path.name.startswith("."))


def _folders(folder: Path, key: str) -> Iterator[Path]:
    """A folder and those below it that are not hidden, each once, by a link only if there is no other way."""
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        found = _stat(folder, key)
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        yield folder
        for path in _listed(folder, key):
            if not path.name.startswith(".") and _leads_to_folder(path, key):
                (links if path.is_symlink() else folders).append(path)


def _listed(folder: Path, key: str) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError as error:
        raise UserError(f"{key}: the folder {shown(folder)} cannot be read ({error.strerror})") from error


# --- globs -----------------------------------------------------------------------------------------


def _glob(pattern: Path, name: str, key: str) -> list[Path]:
    first, *parts = pattern.parts
    base, parts = (Path(first), parts) if pattern.is_absolute() else (Path(), [first, *parts])
    while parts and _exists(base / parts[0], key):  # whatever characters it has
        base, parts = base / parts[0], parts[1:]
    rest = "/".join(parts)
    patterns = []
    if rest.count("{") <= MAX_BRACES:
        patterns = list(islice(_alternatives(rest), MAX_ALTERNATIVES + 1))
    require(
        0 < len(patterns) <= MAX_ALTERNATIVES,
        f"{key}={name} stands for too many names; write it with * in place of some {{a,b}}",
    )
    files = []
    for alternative in patterns:
        found = _matching(base, [part for part in alternative.split("/") if part not in ("", ".")], key)
        which = f" ({shown(base / alternative)})" if len(patterns) > 1 else ""
        require(
            bool(found),
            f"{key}={name} is neither a file nor a folder, and no file matches it as a glob{which}",
        )
        files += found
    return sorted(set(files), key=str)


def _matching(base: Path, parts: list[str], key: str) -> list[Path]:
    files = []
    for path in _matches(base, parts, key):
        if not _is_folder(path, key):
            files.append(path)
        elif data_suffix(path) in KNOWN_SUFFIXES:  # as Spark writes a table
            files += _data_files(path, f"{key}: {shown(path)}", key)
    return files


def _matches(base: Path, parts: list[str], key: str) -> Iterator[Path]:
    if not parts:
        yield base
        return
    head, *rest = parts
    if _exists(base / head, key):
        yield from _matches(base / head, rest, key)
    elif head == "**":
        for folder in _folders(base, key) if _leads_to_folder(base, key) else ():
            yield from _matches(folder, rest or ["*"], key)
    elif re.search(r"[*?[]", head) and _leads_to_folder(base, key):
        for path in _listed(base, key):
            hidden = path.name.startswith(".") and not head.startswith(".")
            if not hidden and fnmatchcase(path.name, head):
                yield from _matches(path, rest, key)


def _alternatives(pattern: str) -> Iterator[str]:
    """The patterns that one with ``{a,b}`` stands for, from left to right; braces may hold braces."""
    depth, start = 0, 0
    commas: list[int] = []
    for place, character in enumerate(pattern):
        if character == "{":
            if depth == 0:
                start, commas = place, []
            depth += 1
        elif character == "," and depth == 1:
            commas.append(place)
        elif character == "}" and depth:
            depth -= 1
            if depth == 0 and commas:
                bounds = [start, *commas, place]
                for left, right in pairwise(bounds):
                    yield from _alternatives(
                        pattern[:start] + pattern[left + 1 : right] + pattern[place + 1 :]
                    )
                return
    yield pattern


# --- one path --------------------------------------------------------------------------------------


def _exists(path: Path, key: str) -> bool:
    """Also for a link that leads nowhere."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as error:  # a null character
        raise UserError(f"{key}: {shown(path)} is no path ({error})") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise UserError(f"{key}: {shown(path)} cannot be read ({error.strerror})") from error
    return True


def _leads_to_folder(path: Path, key: str) -> bool:
    """False also for a link that leads nowhere."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return False
        raise UserError(f"{key}: {shown(path)} cannot be read ({error.strerror})") from error


def _is_folder(path: Path, key: str) -> bool:
    return stat.S_ISDIR(_stat(path, key).st_mode)


def _stat(path: Path, key: str) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            raise UserError(
                f"{key}: {shown(path)} is a link to {shown(Path(os.readlink(path)))}, which does not exist;"
                " bring the file back, or remove the link"
            ) from error
        raise UserError(f"{key}: {shown(path)} cannot be read ({error.strerror})") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "no file")
