"""Damaged and hostile files in a run folder: each is passed over or refused in one sentence, none hangs.

The whole list is run by ``make test-all``, every ninth of it otherwise.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.run_folders import reseal
from helpers.runs import compose

from rsotrain.config.schema import Config
from rsotrain.errors import UserError
from rsotrain.running.mode import train

Damage = Callable[[Path], object]

DEEP = b"[" * 50_000
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "random": bytes((i * 7919) % 256 for i in range(4096)),
    "nested": DEEP,
    "deep": b'{"step": ' + DEEP[:101] + b"]" * 101 + b"}",
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "list": b"[]",
    "text": b'"run"',
    "null": b"null",
    "bomb": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(12)),
}


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


PLACES: dict[str, Damage] = {"fifo": fifo, "device": device, "folder": folder}
NEWEST = "checkpoints/step_00000004"
NUMBERS = [-1, 1.5, float("nan"), float("inf"), 10**18, 10**4000]
VALUES: list[object] = ["x", None, [], {}, True, "9" * 5000, *NUMBERS]
RUN_KEYS = ["data", "seconds", "validation", "record", "settings", "best_loss"]
KEYS = ["step", "tokens", "data", "sequences", "order", "run", *(f"run.{key}" for key in RUN_KEYS)]


def header(text: bytes, size: int | None = None, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


def entry(**changed: object) -> bytes:
    described = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changed
    return json.dumps({"model.norm.weight": described}).encode()


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x02",
    "endless header": header(b"{}", 2**62),
    "large header": header(b"{}", 2**31),
    "no JSON": header(b"{nope}"),
    "nested header": header(DEEP),
    "not UTF-8": header(b"\xff\xfe{}"),
    "no tensors": header(b"{}"),
    "other tensors": header(entry(), rest=bytes(16)),
    "unknown type": header(entry(dtype="F1"), rest=bytes(16)),
    "negative shape": header(entry(shape=[-2, -2]), rest=bytes(16)),
    "huge shape": header(entry(shape=[2**62, 2**62]), rest=bytes(16)),
    "text for a shape": header(entry(shape="ab"), rest=bytes(16)),
    "offsets beyond the end": header(entry(data_offsets=[0, 2**40]), rest=bytes(16)),
    "offsets backwards": header(entry(data_offsets=[16, 0]), rest=bytes(16)),
    "truncated": header(entry(), rest=bytes(7)),
}


def cases() -> Iterator[tuple[str, str, Damage]]:
    """(name, file, damage)"""
    texts = ["config.yaml", "run.json", "summary.json", "metrics.jsonl"]
    texts += [f"{NEWEST}/{name}" for name in ("trainer.json", "checksums.json", "evaluation.json")]
    for file in texts:
        for what, content in CONTENTS.items():
            yield f"{file} {what}", file, lambda path, content=content: path.write_bytes(content)
        for what, place in PLACES.items():
            yield f"{file} {what}", file, place
    for file in (f"{NEWEST}/model.safetensors", f"{NEWEST}/optimizer.safetensors"):
        for what, content in SAFETENSORS.items():
            yield f"{file} {what}", file, lambda path, content=content: sealed(path, content)
        for what, place in PLACES.items():
            yield f"{file} {what}", file, place
    record = f"{NEWEST}/trainer.json"
    for number, key in enumerate(KEYS):
        for value in VALUES[number % 2 :: 2]:
            name = f"{record} {key}={str(value)[:10]}"
            yield name, record, lambda path, k=key, v=value: sealed(path, with_value(path, k, v))
    yield f"{NEWEST} folder", f"{NEWEST}/model.safetensors", lambda path: sealed_shards(path)


def sealed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    reseal(path.parent)


def sealed_shards(path: Path) -> None:
    """In the layout of several ranks, whose reader is another."""
    (path.parent / "model").mkdir()
    shard = path.parent / "model/shard-00001-model-00001-of-00001.safetensors"
    shard.write_bytes(header(entry(shape=[2**40, 2**20]), rest=bytes(16)))
    path.unlink()
    listed = json.loads((path.parent / "checksums.json").read_text())
    del listed[path.name]
    (path.parent / "checksums.json").write_text(json.dumps(listed | {f"model/{shard.name}": ""}))
    reseal(path.parent)


def with_value(path: Path, key: str, value: object) -> bytes:
    record = json.loads(path.read_text())
    *outer, last = key.split(".")
    place = record
    for name in outer:
        place = place[name]
    place[last] = value if value != 10**4000 else "BIG"
    return json.dumps(record).replace('"BIG"', "9" * 4000).encode()


CASES = list(cases())


def test_there_are_a_hundred_of_them() -> None:
    assert len(CASES) >= 100
    assert len({name for name, _, _ in CASES}) == len(CASES)


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run with the checkpoints of steps 2 and 4, of 6 steps, and its summary gone."""
    path = tmp_path_factory.mktemp("hostile")
    config = compose([*tiny, "optimizer=adam", "eval_every=2", f"output_dir={path}", "run_name=whole"])
    config.keep_checkpoints = 3
    train(config)
    shutil.rmtree(path / "whole/checkpoints/step_00000006")
    return config, path


def assert_survives(run: tuple[Config, Path], name: str, file: str, damage: Damage) -> None:
    config, folder = run
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "whole", copy)
    if file != "summary.json":
        (copy / "summary.json").unlink()
    damage(copy / file)
    config.run_name = "copy"
    try:
        summary = train(config)
    except UserError as error:
        said = str(error)
        assert "\n" not in said, name
        assert 20 < len(said) < 1000 + len(str(folder)) * 3, name
    else:
        assert summary["step"] == 6, name
        assert summary["finished"] is True
        log = (copy / "train.log").read_text()
        assert "resumed from" in log, name
        if "safetensors" in file:
            assert "step_00000004 cannot be read and is passed over" in log or "resumed" in log, name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file", "damage"), CASES[::18], ids=[name for name, _, _ in CASES[::18]])
def test_a_hostile_file_gets_one_sentence(
    name: str, file: str, damage: Damage, run: tuple[Config, Path]
) -> None:
    assert_survives(run, name, file, damage)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_hostile_file_gets_one_sentence(run: tuple[Config, Path]) -> None:
    failed = []
    for name, file, damage in CASES:
        try:
            assert_survives(run, name, file, damage)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    assert not failed, "\n".join(failed)
