"""What an optimizer of torch is given to train: a model, named parameters, or groups of parameters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from rsotrain.config.defaults import method_settings
from rsotrain.config.ranges import check_ranges
from rsotrain.errors import UserError, require
from rsotrain.optim.build import Division

Named = list[tuple[str, nn.Parameter]]
Params = nn.Module | Iterable[tuple[str, nn.Parameter]] | Iterable[Mapping[str, Any]]

OF_A_GROUP = ("lr", "scale", "weight_decay", "betas", "eps")
_NAMES = "names decide which parameters the method trains: give the model, or model.named_parameters()"


def divided(
    method: str, params: Params, names_from: nn.Module | None
) -> tuple[nn.Module | Named, list[Division]]:
    """The model or all parameters by name, and the division of each group of ``params``, if these are groups.

    ``method``: the optimizer's name, for sentences. Raises UserError for parameters without a name, for one
    that is in two groups, and for what all groups must share.
    """
    if isinstance(params, nn.Module):
        given: list[Any] = []
    else:
        given = list(params)
    if not any(isinstance(item, Mapping) for item in given):
        require(names_from is None, "names_from is for groups of parameters; leave it out, or give groups")
        return (params if isinstance(params, nn.Module) else [_pair(item, {}) for item in given]), []
    names = {id(p): name for name, p in names_from.named_parameters()} if names_from is not None else {}
    every: Named = []
    divisions = []
    for number, group in enumerate(given):
        require(
            isinstance(group, Mapping) and "params" in group,
            f"group {number} of params must be a mapping with params, as all groups are",
        )
        own = [_pair(item, names) for item in _items(group["params"])]
        divisions.append(Division({name for name, _ in own}, _settings(method, number, group)))
        every += own
    seen: set[int] = set()
    for name, parameter in every:
        require(id(parameter) not in seen, f"{name} is in two groups of params, or twice in one")
        seen.add(id(parameter))
    return every, divisions


def _items(params: Any) -> Iterator[Any]:
    """The parameters of a group, which may be a single one, or a pair."""
    single = isinstance(params, nn.Parameter) or (isinstance(params, tuple) and isinstance(params[0], str))
    yield from [params] if single else params


def _pair(item: Any, names: Mapping[int, str]) -> tuple[str, nn.Parameter]:
    if isinstance(item, nn.Parameter) and names:
        require(id(item) in names, "a group of params has a parameter that names_from does not have")
        return names[id(item)], item
    require(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str),
        f"{_NAMES}; groups of parameters without names need names_from=model"
        if isinstance(item, nn.Parameter)
        else _NAMES,
    )
    return item


def _settings(method: str, number: int, group: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in group.items() if key != "params"}
    for key in own:
        require(
            key in OF_A_GROUP,
            f"group {number} of params has {key}, which is no group's own (that are {', '.join(OF_A_GROUP)});"
            f" give {method} {key}=… once",
        )
    if "weight_decay" in own:  # the group says itself what is decayed
        own["decay_norms_and_embeddings"] = True
    return own


def check_group(method: str, number: int, settings: dict[str, Any]) -> None:
    """Raise UserError where the ``settings`` of a group, with those of all, are none of the method's."""
    try:
        check_ranges(method_settings(method, settings))
    except UserError as error:
        raise UserError(f"group {number} of params: {error}") from error


def whole_model(method: str, named: nn.Module | Sequence[tuple[str, nn.Parameter]], model: Any) -> nn.Module:
    """``model``, whose linears the method changes; UserError if a parameter that it trains is in no group."""
    assert not isinstance(named, nn.Module)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{method} changes the linears of the model, so groups of params need names_from=model"
        )
    given = {id(parameter) for _, parameter in named}
    for name, parameter in model.named_parameters():
        require(
            id(parameter) in given or not parameter.requires_grad,
            f"{name} is in no group of params, but {method} takes the model as a whole; add it, or freeze it",
        )
    return model
