"""The files of ``conf/`` without Hydra, for programs that use a method and no run."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rsotrain import plugged
from rsotrain.config.methods import OPTIMIZERS, OptimizerConfig
from rsotrain.config.samplers import SAMPLERS, SamplerConfig
from rsotrain.errors import UserError, require
from rsotrain.files import read_yaml


def conf_dir() -> Path:
    """The folder of YAML groups: inside the installed package, else at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/config.yaml beside {package}: the installation is incomplete")


class Defaults(NamedTuple):
    """What a file says. ``sampler``: the name of the method's own; empty in a sampler's file.

    A value in ``values`` may be an interpolation, such as ``${model.num_attention_heads}``.
    """

    schema: type
    values: dict[str, Any]
    sampler: str


def method_names() -> tuple[str, ...]:
    """The options of ``optimizer=…``, those of the user's own among them."""
    return tuple(sorted(_files("optimizer")))


def _files(group: str) -> dict[str, Path]:
    """Option of ``group`` -> its file."""
    own = plugged.__path__ if group == "optimizer" else ()
    folders = [*map(Path, own), conf_dir() / group]
    return {path.stem: path for folder in folders for path in folder.glob("*.yaml")}


@cache
def tuned_method(name: str) -> str | None:
    """The method whose rates ``tuned=name`` has; None for a file that is not one of ours."""
    file = conf_dir() / f"tuned/{name}.yaml"
    if not file.is_file():
        return None
    (method,) = (
        entry["override /optimizer"] for entry in read_yaml(file)["defaults"] if isinstance(entry, dict)
    )
    return str(method)


def method_defaults(name: str) -> Defaults:
    """What ``optimizer=name`` means, for a name in ``method_names``."""
    return _defaults("optimizer", name)


def _defaults(group: str, name: str) -> Defaults:
    """The file of ``group`` after the files, or the schema, that its list of defaults names."""
    content = dict(read_yaml(_files(group)[name]))
    schemas = OPTIMIZERS if group == "optimizer" else SAMPLERS
    found = Defaults(object, {}, "")
    for entry in content.pop("defaults"):
        if isinstance(entry, dict):
            found = found._replace(sampler=entry["override /sampler"])
        elif entry.startswith("/schema/"):
            found = found._replace(schema=schemas[entry.split("/")[3].partition("@")[0]])
        elif entry != "_self_":
            found = _defaults(group, entry)
    own = content.get("optimizer", {}) if group == "optimizer" else content
    return found._replace(values=found.values | own)


def method_settings(name: str, settings: dict[str, Any]) -> OptimizerConfig:
    """The settings of ``optimizer=name`` with ``settings`` in place of the file's; UserError if they are
    no settings of the method, of the wrong type, or missing."""
    defaults = method_defaults(name)
    values = defaults.values | settings
    for field, value in values.items():
        if isinstance(value, str) and value.startswith("${"):
            raise UserError(f"{name} needs {field}=…, which a run takes from {value[2:-1]}")
    return _typed(defaults.schema, values, name)


def sampler_settings(name: str, **settings: Any) -> SamplerConfig:
    """The settings of ``sampler=name`` with ``settings`` in place of the file's; UserError as above."""
    known = sorted(_files("sampler"))
    require(name in known, f"there is no sampler {name!r}; there are {', '.join(known)}")
    defaults = _defaults("sampler", name)
    return _typed(defaults.schema, defaults.values | settings, name)


def _typed(schema: type, values: dict[str, Any], name: str) -> Any:
    structured = OmegaConf.structured(schema)
    known = [field.name for field in fields(schema)]
    for key, value in values.items():
        require(key in known, f"{name} has no setting {key}; it has {', '.join(sorted(known))}")
        try:
            OmegaConf.update(structured, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={value!r} of {name}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(structured)
