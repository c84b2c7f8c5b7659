"""CUDA tensors without memory on a build of torch without CUDA, for a process of its own.

torch has all that fake tensors need but a guard and hooks of the device; ``fake_cuda.cpp`` has these. They
must be there before torch asks for them for the first time, so call ``load`` before torch is imported.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")


def load() -> None:
    """Compile the guard, unless this torch has it already, load it, import torch and let it see a device."""
    assert "torch" not in sys.modules, "torch has decided already that there is no CUDA"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    guard = _compiled(root)
    for library in ("libtorch_global_deps.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / library), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)
    _see_devices()


def _compiled(root: Path) -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + (root / "version.py").read_bytes() + str(root).encode())
    target = Path(tempfile.gettempdir()) / f"rsotrain-fake-cuda-{os.getuid()}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(part), "-ltorch_cpu", "-lc10"], check=True)
        part.rename(target)
    return target


def _see_devices() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    properties = SimpleNamespace(
        major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, name="fake", uuid="fake"
    )
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda *_, **__: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "fake",
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "max_memory_allocated": lambda *_: 1,
        "reset_peak_memory_stats": lambda *_: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": _on_stream,
    }.items():
        setattr(torch.cuda, name, value)
    setattr(torch.Tensor, "pin_memory", lambda self, *_: self)  # noqa: B010 (mypy refuses the plain assignment)
    setattr(torch.Tensor, "record_stream", lambda self, _: None)  # noqa: B010
    setattr(FakeTensorMode, "avoid_device_init", property(lambda _: True))  # noqa: B010


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device, self.stream_id, self.device_index, self.device_type = torch.device("cuda", 0), 0, 0, 1

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    yield
