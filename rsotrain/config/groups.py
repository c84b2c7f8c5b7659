"""``optimizer.groups``: matrices that other methods train than the run's own, found by their names.

Each item of the list is a mapping: ``pattern``, a regular expression on the names of parameters;
``optimizer``, an option of ``optimizer=…``; ``sampler``, where not the method's own: an option of
``sampler=…``, or a mapping with its ``name`` and settings; and keys of ``optimizer.*`` for this group.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsotrain.config.defaults import method_defaults, method_names, method_settings, sampler_settings
from rsotrain.config.keys import did_you_mean
from rsotrain.config.method import OptimizerConfig
from rsotrain.config.ranges import check_ranges
from rsotrain.config.samplers import SamplerConfig
from rsotrain.errors import UserError, require

# What a group takes from the run where neither it nor its method's file says otherwise, as adam8bit's does.
INHERITED = ("weight_decay", "decay_at_lr", "state_dtype")
# What a run has once: of what all methods do, or of the parameters that no method has.
SHARED = ("weight_rounding", "update_in_backward", "decay_norms_and_embeddings", "rest", "groups")
_OWN = ("pattern", "optimizer", "sampler")


@dataclass(frozen=True)
class MethodGroup:
    """``number``: the place in the list, from 0. ``optimizer``: as ``optimizer=name`` has it, but
    with the group's own settings and the run's; its ``block_parameters`` is ``pattern`` alone."""

    number: int
    pattern: str
    optimizer: OptimizerConfig
    sampler: SamplerConfig

    @property
    def key(self) -> str:
        """The item, as sentences name it."""
        return _key(self.number)

    @property
    def label(self) -> str:
        """The group, as tables name it."""
        return f"group {self.number}: {self.optimizer.name}"


def _key(number: int) -> str:
    return f"optimizer.groups[{number}]"


def method_groups(run: OptimizerConfig) -> list[MethodGroup]:
    """The groups of a run's optimizer, in their order.

    Raises UserError for an item that names no pattern or no method, and for settings that the method does not
    have or that a run would refuse.
    """
    return [_group(number, item, run) for number, item in enumerate(run.groups)]


def _group(number: int, item: Any, run: OptimizerConfig) -> MethodGroup:
    key = _key(number)
    require(isinstance(item, Mapping), f"{key}={item} must be a mapping: {{pattern: …, optimizer: …}}")
    for name in ("pattern", "optimizer"):
        require(
            isinstance(item.get(name), str) and bool(item[name]),
            f"{key} needs a text as its {name}; a group is {{pattern: …, optimizer: …}}",
        )
    pattern, name = item["pattern"], item["optimizer"]
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error})") from error
    known = method_names()
    require(name in known, f"{key}: optimizer={name} does not exist{did_you_mean(name, known)}")
    for setting in (*SHARED, "name", "block_parameters"):
        require(setting not in item, f"{key} has {setting}, which {_instead(setting)}; leave it out")
    own = {setting: value for setting, value in item.items() if setting not in _OWN}
    try:
        defaults = method_defaults(name)
        of_run = [*SHARED, *(setting for setting in INHERITED if setting not in defaults.values)]
        shared = {setting: getattr(run, setting) for setting in of_run if setting != "groups"}
        optimizer = method_settings(name, shared | {"block_parameters": [pattern]} | own)
        sampler = _sampler(item.get("sampler", defaults.sampler))
        check_ranges(optimizer)
        check_ranges(sampler, "sampler.")
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return MethodGroup(number, pattern, optimizer, sampler)


def _instead(setting: str) -> str:
    if setting == "block_parameters":
        return "is its pattern"
    return "is its optimizer" if setting == "name" else f"a run has once, as optimizer.{setting}"


def _sampler(given: Any) -> SamplerConfig:
    if isinstance(given, Mapping):
        settings = {str(key): value for key, value in given.items()}
        require(isinstance(settings.get("name"), str), "sampler must be a name, or a mapping with a name")
        return sampler_settings(settings.pop("name"), **settings)
    require(isinstance(given, str), "sampler must be a name, or a mapping with a name")
    return sampler_settings(given)


def first_match(name: str, patterns: Sequence[str]) -> int | None:
    """The index of the first of ``patterns`` that finds the parameter ``name``; None where none does."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), None)


def all_methods(
    optimizer: OptimizerConfig, sampler: SamplerConfig
) -> Iterator[tuple[OptimizerConfig, SamplerConfig]]:
    """The run's own method, and those of its groups."""
    yield optimizer, sampler
    for group in method_groups(optimizer):
        yield group.optimizer, group.sampler
