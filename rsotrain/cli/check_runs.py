"""Whether the runs of a list would start: each is composed and held against all rules, without running it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress, product
from random import Random
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rsotrain.cli.compose import checked_config, register_schemas
from rsotrain.cli.mistakes import explain
from rsotrain.cli.overrides import check_overrides, normalise
from rsotrain.cli.text_keys import quote
from rsotrain.config.defaults import conf_dir
from rsotrain.errors import UserError

MOST_TRIED = 128  # members of a sweep; composing and checking one takes about 0.15 s


def faults_of(runs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """Place -> sentence of each of the ``runs`` (place, overrides) that would be refused."""
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return {place: fault for place, given in runs if (fault := fault_of(given)) is not None}


def fault_of(given: Sequence[str]) -> str | None:
    """What the command line ``rsotrain …`` would say; None where it would start. Hydra is initialised."""
    from rsotrain.running.settled import settle_precision
    from rsotrain.training.composition import check_composition

    try:
        overrides = normalise(given)
        check_overrides(overrides)
        composed = compose("config", overrides, return_hydra_config=True)
        tuned = composed.hydra.runtime.choices.get("tuned")
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        check_composition(settle_precision(checked_config(composed, tuned, overrides)))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return explain(error, overrides)
    return None


def members_of_sweep(parameters: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Of a W&B sweep the runs to try: all combinations of its values and of the ends of its ranges.

    Of more than ``MOST_TRIED`` so many are drawn, always the same, in which each value of a parameter comes
    as often as the others. Each run bears the name of what it does not share with all others.
    """
    values = {key: list(_values(parameter)) for key, parameter in parameters.items()}
    if math.prod(map(len, values.values())) <= MOST_TRIED:
        rows = list(product(*values.values()))
    else:
        rows = list(zip(*map(_dealt, values, values.values()), strict=True))
    members = [[f"{key}={_shown(value)}" for key, value in zip(values, row, strict=True)] for row in rows]
    varied = [len(each) > 1 for each in values.values()]
    return [(" ".join(compress(run, varied)) or "its one run", run) for run in members]


def _dealt(key: str, values: Sequence[Any]) -> list[Any]:
    """``MOST_TRIED`` of the values, shuffled: all of them, before one comes again."""
    random, dealt = Random(key), list[Any]()
    while len(dealt) < MOST_TRIED:
        dealt += random.sample(values, len(values))
    return dealt[:MOST_TRIED]


def _values(parameter: Mapping[str, Any]) -> Iterator[Any]:
    if "values" in parameter:
        yield from parameter["values"]
    else:
        yield from (parameter[name] for name in ("value", "min", "max") if name in parameter)


def _shown(value: object) -> str:
    """A value as Hydra's command line takes it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return quote(value) if isinstance(value, str) and not _reads_as_it_is(value) else str(value)


def _reads_as_it_is(text: str) -> bool:
    try:
        return OverridesParser.create().parse_rule(text, "value") == text
    except HydraException:
        return False
