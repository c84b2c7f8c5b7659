"""Reading what others may have damaged or made, and saying what the disk says."""

import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rsotrain.errors import TrainingError, UserError
from rsotrain.files import (
    MAX_DEPTH,
    MAX_YAML_BYTES,
    lacks_room,
    os_errors_said,
    read_json,
    read_yaml,
    write_atomic,
)

Read = Callable[[Path], object]


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_whole_is_read(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{"a": [1, 2.5, null, true, "é🙂"], "b": {"c": -3}}')
    assert read(file) == {"a": [1, 2.5, None, True, "é🙂"], "b": {"c": -3}}
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    file.write_text(deepest)
    value = read(file)
    for _ in range(MAX_DEPTH - 1):
        assert isinstance(value, list)
        (value,) = value
    assert value == []


def test_yaml_keeps_what_people_write(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    text = "base: &base {lr: 1.0e-3, date: 2026-11-26}\nrun:\n  <<: *base\n  steps: 10\nall: [*base, *base]\n"
    file.write_text(text)
    assert read_yaml(file) == yaml.safe_load(text)
    file.write_text("# nothing yet\n")
    assert read_yaml(file) is None


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGE_BOMB = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
JSON_DAMAGE = {
    "empty": (b"", "Expecting value"),
    "torn": (b'{"a": 1', "Expecting"),
    "binary": (bytes(range(128, 256)), "not UTF-8"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deeper than others walk": (b"[" * 101 + b"]" * 101, "nested too deeply"),
    "digits": (b'{"step": ' + b"9" * 5000 + b"}", "4300"),
}
YAML_DAMAGE = {
    "torn": (b"a: [", "line 1"),
    "binary": (bytes(range(128, 256)), "not UTF-8"),
    "control": (b"a: \x00", "YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "another document"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(600)), "nested too deeply"),
    "deeper than others walk": (b"[" * 101 + b"]" * 101, "nested too deeply"),
    "digits": (b"step: " + b"9" * 5000, "no number"),
    "sexagesimal": (b"step: 1" + b":59" * 5000, "no number"),
    "aliases": (BOMB.encode(), "too many values"),
    "merged aliases": (MERGE_BOMB.encode(), "too many values"),
    "itself": (b"a: &a [*a]", "contains itself"),
    "code": (b"!!python/object/apply:os.system ['true']", "python/object"),
    "date": (b"when: 2026-02-31", "day is out of range"),
    "large": (b"# " + b"x" * MAX_YAML_BYTES, "more than 1 MiB"),
}


def assert_refused(read: Read, file: Path, sentence: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        read(file)
    assert time.monotonic() - start < 20
    said = str(raised.value)
    assert said.startswith(f"{file} ")
    assert sentence in said
    assert "\n" not in said
    assert len(said) < 300 + len(str(file))


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_damaged_json_gets_one_sentence(damage: str, tmp_path: Path) -> None:
    content, sentence = JSON_DAMAGE[damage]
    (tmp_path / "file.json").write_bytes(content)
    assert_refused(read_json, tmp_path / "file.json", sentence)


@pytest.mark.parametrize("damage", YAML_DAMAGE)
def test_damaged_yaml_gets_one_sentence(damage: str, tmp_path: Path) -> None:
    content, sentence = YAML_DAMAGE[damage]
    (tmp_path / "file.yaml").write_bytes(content)
    assert_refused(read_yaml, tmp_path / "file.yaml", sentence)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_file_is_not_opened(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        for name in ("folder", "fifo", "zero", "socket"):
            assert_refused(read, tmp_path / name, "no regular file")
    assert_refused(read, tmp_path / "loop", "symbolic links")
    assert_refused(read, tmp_path / "absent", "No such file")


def test_json_has_a_limit_of_size(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("[" + " " * 2**20 + "]")
    assert read_json(tmp_path / "file.json") == []
    with pytest.raises(UserError, match="more than 1 MiB"):
        read_json(tmp_path / "file.json", max_bytes=2**20)


@pytest.mark.parametrize("kind", [UserError, TrainingError])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_only_a_lack_of_room_is_called_one(number: int, kind: type[UserError] | type[TrainingError]) -> None:
    with pytest.raises(kind) as raised, os_errors_said("x cannot be written", kind):
        raise OSError(number, os.strerror(number), "x")
    said = str(raised.value)
    assert said.startswith(f"x cannot be written: {os.strerror(number)}")
    assert ("make room" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_a_lack_of_room_is_known_by_its_quotation() -> None:
    assert lacks_room(OSError("I/O error: No space left on device (os error 28)"))
    assert lacks_room(OSError("[Errno 122] Disk quota exceeded: 'x'"))
    assert not lacks_room(OSError("[Errno 20] Not a directory: 'step_28'"))
    assert not lacks_room(OSError("os error 280"))


def test_writing_whole_follows_no_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "file").symlink_to(target)
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(target)
    write_atomic(tmp_path / "file", "new")
    assert target.read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "target"]
