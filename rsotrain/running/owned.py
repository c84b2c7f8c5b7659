"""What in a run folder is the run's own: links that lead out of it are refused, nothing else is removed."""

import os
import shutil
import stat
from pathlib import Path

from rsotrain.checkpoints.files import is_checkpoint_name
from rsotrain.data.tokenizer import TOKENIZER_FOLDER
from rsotrain.errors import UserError
from rsotrain.tracking.run_files import CHECKPOINTS, FILES, LOCK, METRICS, WANDB

_FOLDERS = (CHECKPOINTS, TOKENIZER_FOLDER, WANDB)


def refuse_links(run: Path) -> None:
    """Raises UserError where a name that the run writes to is a link, or no file or folder as it must be.

    Whoever made such a link, the run would write, or remove, outside of its folder.
    """
    for name in FILES:
        _require(run / name, stat.S_ISREG, "file")
    for name in _FOLDERS:
        _require(run / name, stat.S_ISDIR, "folder")
    for path in _entries(run / TOKENIZER_FOLDER):
        _require(path, stat.S_ISREG, "file")
    for path in _entries(run / CHECKPOINTS):
        if is_checkpoint_name(path.name):
            _require(path, stat.S_ISDIR, "folder")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _require(path: Path, kind: object, word: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not kind(mode):  # type: ignore[operator]
        found = (
            "a symbolic link, and a run writes only inside its folder" if stat.S_ISLNK(mode) else f"no {word}"
        )
        raise UserError(
            f"{path} is {found}; take it away, choose another run_name, or overwrite=true to start again"
        )


def clear(run: Path) -> None:
    """Forget an earlier run in ``run``, and nothing else that may lie there. A link goes, not what it names.

    Raises OSError.
    """
    for name in (CHECKPOINTS, WANDB):
        remove(run / name)
    for name in FILES:
        if name != LOCK:
            remove(run / name)
    for path in [run / TOKENIZER_FOLDER, *_entries(run / TOKENIZER_FOLDER)]:
        if path.is_symlink():
            path.unlink()


def remove(path: Path) -> None:
    """A file, a link, or a folder with all in it; nothing where there is none. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def forget_refused(run: Path, made: list[Path]) -> None:
    """Take away what a start that was refused has made, unless something of value has come into it.

    ``made``: the folders that were not there before, the run's own last; nothing happens where it is not
    among them.
    """
    metrics = run / METRICS
    if run not in made or _entries(run / CHECKPOINTS) or (metrics.is_file() and metrics.stat().st_size > 0):
        return
    for name in (*FILES, *_FOLDERS):
        remove(run / name)
    for folder in reversed(made):
        if _entries(folder):
            return
        folder.rmdir()
