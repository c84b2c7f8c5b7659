"""Checkpoint folders: safetensors and JSON, so that reading one cannot run code.

``checkpoints/step_00000100/`` holds ``trainer.json``, the tensors, and ``checksums.json`` with the SHA-256 of
every other file. One process writes ``model.safetensors`` and ``optimizer.safetensors``; several write the
folders ``model`` and ``optimizer`` with torch.distributed.checkpoint, a safetensors file for each rank.
Either is read back by any number of processes. A folder is written under a temporary name, flushed to
disk and renamed when whole: one with its final name is complete, whenever a process was killed.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rsotrain.checkpoints.record import RECORD, DamagedError, add_evaluation, check_record, load_record, score
from rsotrain.errors import NonFiniteError
from rsotrain.files import read_json
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import Shard

_NAME = re.compile(r"^step_(\d{8})$")
_PARTIAL = ".partial-"
_CHECKSUMS = "checksums.json"
KINDS = ("model", "optimizer")

Tensors = Mapping[str, torch.Tensor]


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and is_checkpoint_name(p.name))


def is_checkpoint_name(name: str) -> bool:
    return _NAME.match(name) is not None


# --- writing -------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    record: Mapping[str, Any],
    *,
    keep: int,
    shards: Mapping[str, Shard] | None = None,
    world: World | None = None,
) -> Path:
    """Write ``step``'s checkpoint; keep it, the newest before it, ``keep`` in all, and the best.

    ``tensors``: by kind ("model", "optimizer") and name, in CPU memory; with several ranks, which all call
    this, the piece that ``shards`` says. The best has the lowest ``record["score"]``. What lies there of
    this step or of later ones is of a course that training has left, or damaged, and goes, as does what
    was left unfinished. Raises OSError or SafetensorError, on all ranks, if the disk is full or the folder
    cannot be written; the earlier checkpoints are then untouched.
    """
    final = folder / f"step_{step:08d}"
    unfinished = folder / f"{_PARTIAL}{final.name}"
    try:
        if world is None or world.size == 1:
            _save_alone(unfinished, final, tensors, record, keep)
        else:
            _save_together(unfinished, final, tensors, record, keep, shards or {}, world)
    except (OSError, SafetensorError):
        if world is None or world.is_main:  # what is half written may be what fills the disk
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def _save_alone(
    unfinished: Path, final: Path, tensors: Mapping[str, Tensors], record: Mapping[str, Any], keep: int
) -> None:
    _prepare(unfinished)
    for kind in KINDS:
        save_file({n: t.contiguous() for n, t in tensors[kind].items()}, unfinished / f"{kind}.safetensors")
    _finish(unfinished, final, record, _checksums(unfinished), keep)


def _save_together(
    unfinished: Path,
    final: Path,
    tensors: Mapping[str, Tensors],
    record: Mapping[str, Any],
    keep: int,
    shards: Mapping[str, Shard],
    world: World,
) -> None:
    world.main_together(lambda: _prepare(unfinished))
    for kind in KINDS:
        world.together(partial(_save_pieces, unfinished / kind, tensors[kind], shards, world))
    own = world.together(lambda: _checksums(unfinished, f"shard-{world.rank + 1:05d}-"))
    checksums = {name: digest for part in world.gathered(own) for name, digest in part.items()}
    world.main_together(lambda: _finish(unfinished, final, record, checksums, keep))


def _prepare(unfinished: Path) -> None:
    unfinished.parent.mkdir(exist_ok=True)  # the run's own folder is there, or has been taken away
    for left in unfinished.parent.glob(f"{_PARTIAL}*"):  # before anything is written: it takes room
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
    unfinished.mkdir()


def _save_pieces(folder: Path, tensors: Tensors, shards: Mapping[str, Shard], world: World) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    # safetensors and their JSON headers; DCP's own format has a pickle for its metadata
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    # The tensors are on the CPU. Where there are GPUs, torch would copy "ahead" all the same, in a thread
    # whose current device is the first GPU, on every rank.
    writer.per_thread_copy_ahead = 0
    try:
        dcp.save(_placed(tensors, shards, world), storage_writer=writer, process_group=world.patient)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise OSError("; ".join(sorted({str(cause) for cause in causes}))) from error


def _placed(tensors: Tensors, shards: Mapping[str, Shard], world: World) -> dict[str, Any]:
    """The pieces as DTensors; empty ones are left out."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as ShardPlacement

    assert world.cpu_mesh is not None
    placed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        shard = shards.get(name)
        if shard is None or shard.dim is None:
            placed[name] = tensor
        elif tensor.numel() > 0:
            placements = [Replicate()] * (world.cpu_mesh.ndim - 1) + [ShardPlacement(shard.dim)]
            shape = torch.Size(shard.shape)
            placed[name] = DTensor.from_local(
                tensor.contiguous(),
                world.cpu_mesh,
                placements,
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            )
    return placed


def _checksums(folder: Path, prefix: str = "") -> dict[str, str]:
    """SHA-256 of each file below ``folder`` whose name begins with ``prefix``, by its path there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.startswith(prefix))
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _finish(
    unfinished: Path, final: Path, record: Mapping[str, Any], checksums: dict[str, str], keep: int
) -> None:
    (unfinished / RECORD).write_text(json.dumps(dict(record), indent=1))
    checksums |= {RECORD: _digest(unfinished / RECORD)}
    (unfinished / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    mode = (unfinished / RECORD).stat().st_mode
    for path in unfinished.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes files that only their owner reads
        _sync(path)
    _sync(unfinished)
    _remove([final] if final.exists() else [])
    unfinished.rename(final)
    _sync(final.parent)
    _prune(final, keep)


def score_checkpoint(folder: Path, step: int, loss: float, run: Mapping[str, Any], *, keep: int) -> None:
    """Add the evaluation to ``step``'s checkpoint, the newest, and keep those that then are to be kept.

    Nothing happens where it could not be written. Raises OSError.
    """
    final = folder / f"step_{step:08d}"
    if final.is_dir():
        add_evaluation(final, loss, run)
        _prune(final, keep)


def check_finite(tensors: Mapping[str, Tensors]) -> None:
    """Raises NonFiniteError for NaN, and for infinite weights, in tensors in CPU memory.

    ``tensors``: by kind and name. A state may be infinite: a second moment that overflows stops its weight.
    """
    for kind, named in tensors.items():
        for name, tensor in named.items() if kind in KINDS else ():
            if tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta:
                wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
                ends = torch.stack(torch.aminmax(wide))  # one pass; NaN comes through
                if bool(ends.isnan().any()) or (kind == "model" and not bool(ends.isfinite().all())):
                    raise NonFiniteError(f"{name} is not finite")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(final: Path, keep: int) -> None:
    others = [path for path in list_checkpoints(final.parent) if path != final]
    earlier = [path for path in others if path.name < final.name]
    kept = {*earlier[max(0, len(earlier) - keep + 1) :], min([final, *reversed(earlier)], key=score)}
    _remove([path for path in others if path not in kept])


def _remove(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        # renamed first: a half-deleted folder must not look complete
        shutil.rmtree(path.rename(path.with_name(f"{_PARTIAL}old-{path.name}")))


# --- reading -------------------------------------------------------------------------------------


def verify(path: Path, rank: int = 0, size: int = 1) -> None:
    """Compare every ``size``-th file, from number ``rank`` on, with its checksum.

    Raises OSError or DamagedError for one that is missing or has changed, or for one too many.
    """
    checksums = read_json(path / _CHECKSUMS)
    if not isinstance(checksums, dict) or RECORD not in checksums:
        raise DamagedError(f"{_CHECKSUMS} is damaged")
    for file in path.rglob("*.safetensors"):  # all that lie there are read
        if file.relative_to(path).as_posix() not in checksums:
            raise DamagedError(f"{file.name} is none of its files")
    for name in checksums:  # on every rank, for each opens some of them
        if not stat.S_ISREG(os.stat(path / name).st_mode):
            raise DamagedError(f"{name} is no regular file")
    for name in sorted(checksums)[rank::size]:
        if _digest(path / name) != checksums[name]:
            raise DamagedError(f"{name} is damaged: its checksum does not fit")


def load_tensors(
    path: Path, kind: str, shards: Mapping[str, Shard] | None = None, world: World | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one kind ("model", "optimizer"), by name, in CPU memory.

    Whole, or with several ranks those that ``shards`` names in the piece it says; of those of them that are
    stored in another shape the model's on the meta device, to say so, and the optimizer's not at all.
    Raises OSError, ValueError or safetensors' SafetensorError if a file is missing or damaged.
    """
    single = path / f"{kind}.safetensors"
    if single.is_file() and (world is None or world.size == 1):
        return load_file(single)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = path if single.is_file() else path / kind
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    if single.is_file():  # that of the other kind lies beside it
        stored = {name: stored[name] for name in _names(single)}
    pieces = {n: shard for n, shard in (shards or {}).items() if n in stored and shard.dim is not None}
    unlike: dict[str, torch.Tensor] = {}
    for name, shard in list(pieces.items()):
        size = tuple(stored[name].size)
        if shard.shape != size:  # whole, it might have the shape of a piece
            if kind == KINDS[0]:
                unlike[name] = torch.empty(size, dtype=stored[name].properties.dtype, device="meta")
            del pieces[name], stored[name]
    state = {
        name: torch.empty(
            pieces[name].piece_shape if name in pieces else tuple(entry.size), dtype=entry.properties.dtype
        )
        for name, entry in stored.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a single process reads
        placed = dict(state) if world is None or world.size == 1 else _placed(state, pieces, world)
        try:
            dcp.load(placed, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            causes = sorted({str(cause) for cause, _ in error.failures.values()})
            raise DamagedError("; ".join(causes)) from error
    return state | unlike


def _names(file: Path) -> list[str]:
    """Of the tensors in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def load_checkpoint(
    path: Path, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(model tensors, optimizer tensors, trainer's record) of one checkpoint folder, whole, verified.

    Raises OSError, ValueError or safetensors' SafetensorError if a file is missing or damaged.
    """
    verify(path)
    model, optimizer = ({n: t.to(device) for n, t in load_tensors(path, kind).items()} for kind in KINDS)
    return model, optimizer, load_record(path)


def read_checkpoint(
    path: Path, shards: Mapping[str, Shard], world: World, kinds: Sequence[str] = KINDS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what Trainer.load_state_dict takes, the run's own record); all ranks call it, each for its pieces.

    ``kinds``: of the tensors to read.

    Each rank verifies some of the files. Raises OSError, ValueError, LookupError, TypeError or
    SafetensorError if the checkpoint is not whole, and NonFiniteError if weights or states are not finite.
    """
    verify(path, world.rank, world.size)
    record = load_record(path)
    check_record(record)
    run = record["run"]
    state: dict[str, Any] = {kind: load_tensors(path, kind, shards, world) for kind in kinds}
    check_finite(state)
    # older checkpoints have less of it
    trainer = {key: value for key, value in record.items() if key not in ("run", "score")}
    return state | {"trainer": trainer}, run
