"""What the tests of W&B share: loggers in a folder of their own, a stand-in server, bounded waits."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_wandb_server import FakeWandbServer

from rsotrain.config.schema import WandbMode
from rsotrain.tracking.wandb_logger import WandbLogger

API_KEY = "a" * 40


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class Wandb:
    """Builds loggers in a folder of their own and collects their warnings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self._loggers: list[WandbLogger] = []

    def __call__(self, mode: WandbMode = WandbMode.auto, **options: Any) -> WandbLogger:
        arguments: dict[str, Any] = {
            "run_dir": self.folder,
            "run_id": "run-1",
            "run_name": "a run",
            "project": "rsotrain",
            "flat_config": {"optimizer.lr": 0.01, "optimizer.betas": [0.9, 0.99], "model.name": "llama_tiny"},
            "warn": self.warnings.append,
            "init_timeout_seconds": 20.0,  # what is healthy may be slow on a busy machine
            "close_timeout_seconds": 30.0,
        }
        self._loggers.append(WandbLogger(mode=mode, **(arguments | options)))
        return self._loggers[-1]

    def end(self) -> None:
        """Let every logger's thread end, also that of a test that failed before it closed its logger."""
        for logger in self._loggers:
            if logger._thread.is_alive():
                logger.close({}, 1)

    def offline_records(self) -> list[Any]:
        """Every record of the only offline run, read from its transaction log."""
        from wandb.proto.wandb_internal_pb2 import Record

        (path,) = self.folder.glob("wandb/offline-run-*/run-*.wandb")
        parsed = []
        for content in leveldb_records(path.read_bytes()[7:]):
            parsed.append(Record())
            parsed[-1].ParseFromString(content)
        return parsed

    def offline_history(self) -> list[dict[str, Any]]:
        rows = [record.history for record in self.offline_records() if record.HasField("history")]
        return [
            {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
            for row in rows
        ]


def leveldb_records(data: bytes, offset: int = 7) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, chunks of (crc 4, length 2, type 1) and content."""
    position, record = 0, b""
    while position + 7 <= len(data):
        left = 32768 - (position + offset) % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield record
            record = b""


@pytest.fixture
def wandb_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wandb]:
    """Without the developer's key, settings or proxies, and what wandb has read of an earlier test's."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    folder = tmp_path / "run"
    folder.mkdir()
    runs = Wandb(folder)
    yield runs
    runs.end()
    threads = [thread for thread in threading.enumerate() if thread.name == "wandb-logger"]
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def connect(wandb_runs: Wandb, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeWandbServer]]:
    """Start a stand-in server and point W&B at it, with a key."""
    servers = []

    def start(**options: Any) -> FakeWandbServer:
        servers.append(FakeWandbServer(**options))
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def log_unhindered(logger: WandbLogger, num_records: int = 200) -> None:
    """Log steps 1 … num_records and check that no call waited for W&B."""
    longest = 0.0
    for step in range(1, num_records + 1):
        start = time.perf_counter()
        logger.log({"train/loss": 1 / step, "tokens": 10 * step}, step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(0.001)
    # Every wait for the network lasts at least 2 s in these tests. The scheduler of a busy machine may hold
    # up any call for a good part of a second.
    assert longest < 2.0
