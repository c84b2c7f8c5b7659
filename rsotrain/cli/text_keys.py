"""Keys of text keep what was written, where Hydra or YAML would read a number, a date or a truth value.

``run_name=2026_11_26`` is the integer 20261126 to Hydra, ``data.revision=83e2010`` is infinity, and ``on`` in
a YAML file is true. The schemas know which keys are text. null stays null; quotes mean what they always do.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

import yaml
from antlr4 import CommonTokenStream, InputStream
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from rsotrain.config.keys import keys_of
from rsotrain.errors import UserError, require

# Functions of Hydra's grammar whose arguments are numbers, whatever the key.
_OF_NUMBERS = ("range", "interval", "int", "float", "bool")
_HYDRA_READS = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
_YAML_READS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp")}
_TEXT_TAG = "tag:yaml.org,2002:str"
_STRUCTURE = re.compile(r"[\[\]{}()'\"\\=]")  # what means something in Hydra's grammar


# --- the command line --------------------------------------------------------------------------------


def quote(text: str) -> str:
    """``text`` in Hydra's quotes, where a backslash stands for itself unless a quote or the end follows."""
    return "'" + re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"


def keep_text(argument: str) -> str:
    """``key=value`` with quotes around the parts of the value that are text, but not to Hydra.

    What Hydra cannot read at all, such as letters beyond ASCII, is quoted, too, if there are no brackets,
    quotes, backslashes or a second ``=`` in it.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+").partition("@")[0]
    if not equals or not any(f"{text}.".startswith(f"{name}.") for text in keys_of(str)):
        return argument
    try:
        spans = list(_misread(_parse(argument), name))
    except HydraException:
        parts = [part.strip(" \t") for part in value.split(",")]
        if name not in keys_of(str) or _STRUCTURE.search(value) or not all(parts):
            return argument  # Hydra says what is wrong with it
        return f"{key}={','.join(part if part == 'null' else quote(part) for part in parts)}"
    for start, end in sorted(spans, reverse=True):
        argument = f"{argument[:start]}{quote(argument[start:end].strip())}{argument[end:]}"
    return argument


def _parse(argument: str) -> Any:
    """The tree of Hydra's own grammar. Raises HydraException."""
    lexer = OverrideLexer(InputStream(argument))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    return parser.override()


def _misread(node: Any, key: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each number and truth value below ``node`` that belongs to a key of text."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        tokens = [t.symbol for t in node.getChildren() if t.symbol.type != OverrideLexer.WS]
        if key in keys_of(str) and len(tokens) == 1 and tokens[0].type in _HYDRA_READS:
            yield node.start.start, node.stop.stop + 1
        return
    if isinstance(node, OverrideParser.FunctionContext) and node.ID().getText() in _OF_NUMBERS:
        return
    if isinstance(node, OverrideParser.DictKeyValuePairContext):
        key = f"{key}.{node.dictKey().getText().strip()}"
    previous = None
    for child in node.getChildren() if hasattr(node, "getChildren") else ():
        if not isinstance(previous, OverrideParser.ArgNameContext):  # reverse=true, of sort(…)
            yield from _misread(child, key)
        previous = child


# --- YAML --------------------------------------------------------------------------------------------


def restore_text(node: yaml.Node, prefix: str = "") -> yaml.Node:
    """A mapping as YAML's composer gives it, with the values of text keys as they stand in the file.

    ``prefix``: the key of the mapping itself, ended by a point. Shared nodes (aliases) stay as they are.
    Raises UserError for a number that is to be a truth value: OmegaConf takes every one but 0 for true.
    """
    if not isinstance(node, yaml.MappingNode):
        return node
    pairs = []
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if name.tag == "tag:yaml.org,2002:merge":
            value = _each(value, partial(restore_text, prefix=prefix))
        elif key in keys_of(str):
            value = _each(value, _as_written)
        elif key in keys_of(bool) and value.tag == "tag:yaml.org,2002:int":
            require(value.value in ("0", "1"), f"{key}={value.value} must be true or false")
        elif any(text.startswith(f"{key}.") for text in keys_of(str) | keys_of(bool)):
            value = restore_text(value, f"{key}.")
        pairs.append((name, value))
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)


def _each(node: yaml.Node, change: Callable[[yaml.Node], yaml.Node]) -> yaml.Node:
    """``change`` of a node, or of each item of a list."""
    if isinstance(node, yaml.SequenceNode):
        items = [change(item) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    return change(node)


def _as_written(node: yaml.Node) -> yaml.Node:
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in _YAML_READS:
        return yaml.ScalarNode(_TEXT_TAG, node.value, node.start_mark, node.end_mark)
    return node


def read_yaml(
    text: str | TextIO, loader_class: type[yaml.SafeLoader], change: Callable[[yaml.Node], yaml.Node]
) -> Any:
    """The content of a YAML document whose tree goes through ``change`` before it becomes values."""
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(change(node))
    finally:
        loader.dispose()


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's own source of YAML files, with ``restore_text``.

    It has the name of Hydra's, which in a process of a launcher's would not stand aside for another.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        name = self._normalize_file_name(config_path)
        full_path = os.path.realpath(os.path.join(self.path, name))
        if not os.path.exists(full_path):
            raise ConfigLoadError(f"Config not found : {full_path}")
        try:
            with open(full_path, encoding="utf-8") as file:
                header = ConfigSource._get_header_dict(file.read(512))
                file.seek(0)
                group = name.rpartition("/")[0].replace("/", ".")
                package = (header["package"] or group).replace("_group_", group)
                prefix = f"{package}.".removeprefix("_global_.").removeprefix(".")
                content = read_yaml(file, get_yaml_loader(), partial(restore_text, prefix=prefix))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{full_path} cannot be read: {reason}") from error
        if content is not None and not isinstance(content, dict):
            raise UserError(f"{full_path} must hold pairs of key: value")
        return ConfigResult(
            config=OmegaConf.create(content or {}),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=header,
        )


def keep_text_of_config_files() -> None:
    """Let Hydra read the files of its groups, those of ``--config-dir`` too, through ``FileConfigSource``."""
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
