"""Optimizers of the user's own: Python files beside YAML files in a folder given by ``--config-dir``.

``DIR/optimizer/mine.py`` has the settings and the class of a method, ``DIR/optimizer/mine.yaml`` its rates.
The file is imported before Hydra composes anything, as a module of ``rsotrain.plugged``, and then is in
the registry like a method of the package.
"""

import dataclasses
import importlib
import inspect
import os
import re
import sys
import traceback
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rsotrain import plugged
from rsotrain.config.defaults import conf_dir
from rsotrain.config.keys import keys_of
from rsotrain.config.methods import OPTIMIZERS, OptimizerConfig
from rsotrain.config.registry import CODE
from rsotrain.errors import UserError, require
from rsotrain.files import read_yaml


def load_plugins(folder: Path | None) -> None:
    """Import the optimizers of ``folder``, the one of ``--config-dir``, in place of those of an earlier call.

    Raises UserError for a file that cannot be imported, registers no method or that of another, and for a
    YAML file that Hydra would never read.
    """
    _forget()
    if folder is None or not folder.is_dir():  # which Hydra says
        return
    _refuse_hidden(folder)
    files = sorted(file for file in (folder / "optimizer").glob("*.py") if not file.name.startswith("_"))
    if not files:
        return
    plugged.__path__[:] = [str((folder / "optimizer").resolve())]
    os.environ[plugged.FOLDER] = plugged.__path__[0]
    for file in files:
        _load(file)


def _forget() -> None:
    """What an earlier command in this process has imported."""
    for schema, settings in list(OPTIMIZERS.items()):
        if plugged.is_plugged(settings):
            del OPTIMIZERS[schema], CODE[settings]
    for name in [name for name in sys.modules if name.startswith(f"{plugged.__name__}.")]:
        del sys.modules[name]
    plugged.__path__.clear()
    os.environ.pop(plugged.FOLDER, None)
    importlib.invalidate_caches()
    keys_of.cache_clear()


def _refuse_hidden(folder: Path) -> None:
    """Hydra looks into ``conf/`` first, and takes the first file of a name."""
    own = conf_dir()
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
        name = file.relative_to(folder)
        require(
            not (own / name).is_file(),
            f"{file} would never be read, since rsotrain has a file {name} itself; give it another name",
        )


def _load(file: Path) -> None:
    name = f"{plugged.__name__}.{file.stem}"
    require(
        re.fullmatch(r"\w+", file.stem) is not None,
        f"{file} cannot be imported under that name; give it one of letters, digits and underscores",
    )
    require(
        file.with_suffix(".yaml").is_file(),
        f"{file} has no {file.stem}.yaml beside it, which would name its schema and its rates; write one",
    )
    before = set(OPTIMIZERS)
    try:
        module = importlib.import_module(name)
    except UserError as error:  # of the registry
        raise UserError(f"{file}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{_place(file, error)}: {type(error).__name__}: {_first_line(error)}") from error
    registered = [schema for schema in OPTIMIZERS if schema not in before]
    require(
        bool(registered),
        f'{file} registers no optimizer; write @optimizer("{file.stem}", "…"), with the name of its class,'
        " above its settings",
    )
    for schema in registered:
        _check(file, schema, module)
    _check_yaml(file.with_suffix(".yaml"), registered)


def _place(file: Path, error: BaseException) -> str:
    """The file with the line in it that ``error`` came from."""
    if isinstance(error, SyntaxError) and error.filename == str(file.resolve()):
        return f"{file}, line {error.lineno}"
    own = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(file.resolve())
    ]
    return f"{file}, line {own[-1]}" if own else str(file)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _check(file: Path, schema: str, module: object) -> None:
    """Raise UserError where the settings of ``schema`` or their code are of no use to the builder."""
    from rsotrain.optim.base import ParamGroupOptimizer

    settings = OPTIMIZERS[schema]
    require(
        isinstance(settings, type)
        and issubclass(settings, OptimizerConfig)
        and "__dataclass_params__" in vars(settings),
        f"{file}: the settings of {schema} must be a @dataclass that derives from OptimizerConfig",
    )
    place, _, name = CODE[settings].partition(":")
    method = getattr(sys.modules.get(place, module), name, None)
    require(
        isinstance(method, type) and issubclass(method, ParamGroupOptimizer),
        f"{file}: @optimizer names {name or 'nothing'} as the code of {schema}, which is no class there that"
        " derives from ParamGroupOptimizer",
    )
    assert isinstance(method, type)
    missing = sorted(getattr(method, "__abstractmethods__", ()))
    require(not inspect.isabstract(method), f"{file}: {name} does not define {', '.join(missing)}")
    for field in dataclasses.fields(settings):
        require(
            not isinstance(field.type, str),
            f"{file}: the type of {settings.__name__}.{field.name} is text, as `from __future__ import"
            " annotations` makes it; leave that line out",
        )
    try:
        OmegaConf.structured(settings)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{file}: {settings.__name__}: {_first_line(error)}") from error


def _check_yaml(file: Path, schemas: list[str]) -> None:
    """Raise UserError where the file names none of ``schemas``, or calls the method by another name."""
    content = read_yaml(file)
    content = content if isinstance(content, dict) else {}
    entries = content.get("defaults")
    named = [f"/schema/optimizer/{schema}@optimizer" for schema in schemas]
    require(
        isinstance(entries, list) and any(entry in named for entry in entries),
        f"{file} names no schema of {file.stem}.py; begin its defaults with {named[0]}",
    )
    own = content.get("optimizer")
    given = own.get("name") if isinstance(own, dict) else None
    require(given == file.stem, f"{file} sets optimizer.name={given}; set {file.stem}, as the file is called")
