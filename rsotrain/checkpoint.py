"""Checkpoints of one process: safetensors and JSON, so that reading one cannot run code.

``checkpoints/step_00000100/`` holds ``model.safetensors``, ``optimizer.safetensors`` and
``trainer.json``. It is written under a temporary name, flushed to disk and renamed when whole: a
folder with that name is complete, whenever the process was killed.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_NAME = re.compile(r"^step_(\d{8})$")
_PARTIAL = ".partial-"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and _NAME.match(p.name))


def save_checkpoint(
    folder: Path,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    trainer: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``step``'s checkpoint; keep it and the newest before it, ``keep`` in all.

    What lies there of this step or of later ones is of a course that training has left, or damaged, and
    goes, as does what was left unfinished. Raises OSError if the disk is full or the folder cannot be
    written; the earlier checkpoints are then untouched.
    """
    final = folder / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_PARTIAL}{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(_detached(model), partial / "model.safetensors")
    save_file(_detached(optimizer), partial / "optimizer.safetensors")
    trainer_file = partial / "trainer.json"
    trainer_file.write_text(json.dumps(dict(trainer), indent=1))
    for file in partial.iterdir():
        file.chmod(trainer_file.stat().st_mode)  # safetensors writes files that only their owner reads
        _sync(file)
    _sync(partial)
    _remove([final] if final.exists() else [])
    partial.rename(final)
    _sync(folder)
    others = [path for path in list_checkpoints(folder) if path != final]
    earlier = [path for path in others if path.name < final.name]
    _remove([path for path in others if path not in earlier[len(earlier) - keep + 1 :]])
    for left in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left)
    return final


def _remove(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        # renamed first: a half-deleted folder must not look complete
        shutil.rmtree(path.rename(path.with_name(f"{_PARTIAL}old-{path.name}")))


def load_checkpoint(
    path: Path, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(model tensors, optimizer tensors, trainer's record) of one checkpoint folder.

    Raises OSError, ValueError or safetensors' SafetensorError if a file is missing or damaged.
    """
    where = str(device)
    return (
        load_file(path / "model.safetensors", device=where),
        load_file(path / "optimizer.safetensors", device=where),
        json.loads((path / "trainer.json").read_text()),
    )
