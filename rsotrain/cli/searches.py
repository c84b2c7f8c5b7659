"""What ``mode=tune`` searches: for each combination of the command line but the seed, one number."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rsotrain.cli.compose import checked_config
from rsotrain.cli.overrides import key_of
from rsotrain.cli.search import Ladder, following
from rsotrain.config.data import TuneConfig
from rsotrain.config.keys import did_you_mean, flatten, known_keys, plain
from rsotrain.config.ranges import Range, check_ranges, range_of
from rsotrain.config.schema import Config
from rsotrain.config.text import check_folder, check_name, check_text
from rsotrain.errors import require

# Of what else there is, losses would not compare, or nothing change.
TUNABLE = ("optimizer.", "sampler.", "lr_scheduler.", "grad_clip")
SEED = "seed"


@dataclass
class Search:
    """One search: ``members`` are its runs of each seed, as overrides without the key that is tuned.

    ``losses``: rung -> loss of each seed's run, inf of one that diverged. ``composed``: of its first member.
    """

    name: str
    members: Sequence[list[str]]
    ladder: Ladder
    config: Config
    composed: DictConfig
    losses: dict[int, dict[int, float]] = field(default_factory=dict)

    def means(self) -> dict[int, float]:
        """Of each rung that all seeds have tried."""
        whole = {rung: losses for rung, losses in self.losses.items() if len(losses) == len(self.members)}
        return {rung: sum(losses.values()) / len(losses) for rung, losses in whole.items()}

    def wanted(self, most: int) -> Iterator[tuple[int, int]]:
        """(rung, seed's number) of the runs that are due; none when it has ended."""
        means = self.means()
        for rung in following(means, self.ladder)[: max(0, most - len(means))]:
            yield from (
                (rung, number)
                for number in range(len(self.members))
                if number not in self.losses.get(rung, {})
            )


def tune_settings(shared: DictConfig) -> TuneConfig:
    settings = OmegaConf.to_object(shared.tune)
    assert isinstance(settings, TuneConfig)
    check_ranges(settings, "tune.")
    check_text(settings, "tune.")
    if settings.name is not None:
        check_name("tune.name", settings.name)
    if settings.path is not None:
        check_folder("tune.path", settings.path)
    require(
        shared.hydra.sweeper._target_.endswith(".BasicSweeper"),
        "mode=tune chooses the values to try itself; leave hydra/sweeper out",
    )
    return settings


# --- from the command line --------------------------------------------------------------------------------


def searches_of(loader: ConfigLoader, shared: DictConfig, settings: TuneConfig) -> list[Search]:
    """One for each combination of what the command line sweeps over but the seed."""
    params = shared.hydra.sweeper.get("params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *shared.hydra.overrides.task]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    (runs,) = BasicSweeper.split_arguments(parsed, None)
    firsts = {word for run in runs for word in run if key_of(word) == settings.key}
    require(
        len(firsts) < 2,
        f"{settings.key} is what is tuned, so several values of it say nothing; give one to begin with",
    )
    members: dict[tuple[str, ...], list[list[str]]] = {}
    for run in runs:
        own = [word for word in run if key_of(word) != "mode" and not word.startswith("tune.")]
        without_seed = tuple(word for word in own if key_of(word) != SEED)
        members.setdefault(without_seed, []).append(["mode=train", *own])
    searches = [_search(loader, shared, of_search, settings) for of_search in members.values()]
    return _with_names(searches, settings)


def _search(
    loader: ConfigLoader, shared: DictConfig, members: Sequence[list[str]], settings: TuneConfig
) -> Search:
    composed = loader.load_sweep_config(shared, members[0])
    config = config_of(composed, members[0])
    start, allowed = _start(config, settings.key)
    ladder = Ladder(
        start, settings.factor, allowed, settings.lowest, settings.highest, whole=isinstance(start, int)
    )
    require(
        ladder.value(0) is not None,
        f"{settings.key}={start:g} is none of the values that tune.lowest and tune.highest leave; begin with"
        f" one of them, {settings.key}=…",
    )
    require(
        ladder.value(1) is not None or ladder.value(-1) is not None,
        f"tune.factor={settings.factor:g} makes no other value of {settings.key}={start:g} that may be tried;"
        " give a larger one",
    )
    without_key = [[word for word in member if key_of(word) != settings.key] for member in members]
    return Search("", without_key, ladder, config, composed)


def _start(config: Config, key: str) -> tuple[float, Range | None]:
    """The value of ``key`` to begin with, and its range. Raises UserError for what cannot be tuned."""
    values = dict(flatten(plain(config)))
    require(
        key in values,
        f"tune.key={key}: there is no such key in this configuration{did_you_mean(key, known_keys())}",
    )
    require(
        key.startswith(TUNABLE),
        f"tune.key={key} is neither the method's nor the schedule's; take one of optimizer.…, sampler.… or"
        " lr_scheduler.…, or grad_clip",
    )
    value, holder = values[key], config
    for name in key.split(".")[:-1]:
        holder = getattr(holder, name)
    fields = {f.name: f for f in type(holder).__dataclass_fields__.values()}
    allowed = range_of(fields[key.split(".")[-1]])
    require(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
        f"tune.key={key} is {value}, and only a number can be tuned",
    )
    require(
        value is not None and value > 0,
        f"tune.key={key}: {'null' if value is None else value} has no multiples to try; give a first value"
        f" with {key}=…",
    )
    return value, allowed if isinstance(allowed, Range) else None


def _with_names(searches: Sequence[Search], settings: TuneConfig) -> list[Search]:
    """Named by method and model, and by what they are told apart by where that is not all."""
    require(
        settings.name is None or len(searches) == 1,
        f"tune.name={settings.name} is for one file, and these are {len(searches)} searches; leave it out",
    )
    if settings.name is not None:
        return [replace(searches[0], name=settings.name)]
    names = [_name(search) for search in searches]
    shared = set.intersection(*(set(search.members[0]) for search in searches))
    return [
        replace(search, name="_".join([name, *_telling(search, shared)] if names.count(name) > 1 else [name]))
        for search, name in zip(searches, names, strict=True)
    ]


def _name(search: Search) -> str:
    """The option of ``tuned`` or the method, and the model: ``galore_llama_9m``."""
    config, tuned = search.config, search.composed.hydra.runtime.choices.get("tuned")
    begin = Path(tuned).name if tuned else config.optimizer.name
    return begin.removesuffix(f"_{config.model.name}") + f"_{config.model.name}"


def _telling(search: Search, shared: set[str]) -> list[str]:
    """What tells a search from others, fit for the name of a file: ``optimizer.rank=64`` as ``rank64``."""
    words = [word.partition("=") for word in search.members[0] if word not in shared]
    return [
        key.rpartition(".")[2] + re.sub(r"\W+", "", value.replace(".", "p"))
        for key, _, value in words
        if key != SEED
    ]


def config_of(composed: DictConfig, overrides: Sequence[str]) -> Config:
    own = composed.copy()
    tuned = own.hydra.runtime.choices.get("tuned")
    OmegaConf.set_struct(own, False)
    del own["hydra"]
    return checked_config(own, tuned, overrides)
