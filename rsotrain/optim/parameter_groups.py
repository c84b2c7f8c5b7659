"""Parameter groups: each parameter is in exactly one, by regular expressions on its name."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from rsotrain.config.groups import MethodGroup, first_match
from rsotrain.errors import UserError, require


@dataclass(frozen=True)
class ParameterGroups:
    """``blocks``: the attention and MLP weights that the patterns match, which the method trains; ``rest``:
    all other trained parameters; ``frozen``: the parameters that are not trained; ``claimed``: for each of
    ``optimizer.groups`` the matrices that it trains."""

    patterns: tuple[str, ...]
    blocks: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]
    claimed: tuple[dict[str, nn.Parameter], ...] = ()

    @property
    def by_methods(self) -> dict[str, nn.Parameter]:
        """What methods train: ``blocks`` and ``claimed``."""
        return {name: p for group in (self.blocks, *self.claimed) for name, p in group.items()}

    def renewed(self, model: nn.Module) -> "ParameterGroups":
        """The same groups with the parameters of ``model``, which have the same names."""
        now = dict(model.named_parameters())

        def renew(group: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
            return {name: now[name] for name in group}

        return replace(
            self,
            blocks=renew(self.blocks),
            rest=renew(self.rest),
            frozen=renew(self.frozen),
            claimed=tuple(map(renew, self.claimed)),
        )


# Of LLaMA, under Hugging Face's names: their rows are looked up, or are seldom a target.
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")


def is_norm_or_embedding(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases, embedding and head: what weight decay leaves alone by default."""
    return parameter.ndim < 2 or _EMBEDDINGS.search(name) is not None


@dataclass(frozen=True)
class GroupRow:
    """A row of the table printed at start. ``lr``: the peak learning rate; None for frozen parameters."""

    group: str
    pattern: str
    num_tensors: int
    num_elements: int
    lr: float | None
    rank: str
    state_bytes: int


def group_parameters(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    patterns: Iterable[str],
    others: Sequence[MethodGroup] = (),
) -> ParameterGroups:
    """Assign each parameter to a group; a tied parameter counts once, under its first name.

    ``others``: the groups of other methods, of which the first whose pattern fits has a parameter, before
    ``patterns`` are asked. Raises UserError for a pattern that is no regular expression or matches no
    parameter, for a group that is left none, and for a matched parameter that is not a matrix.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    unique: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        unique.setdefault(id(parameter), (name, parameter))

    patterns = tuple(patterns)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(
            f"optimizer.block_parameters holds {error.pattern!r}, which is no regular expression ({error})"
        ) from error

    blocks: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    frozen: dict[str, nn.Parameter] = {}
    claimed: tuple[dict[str, nn.Parameter], ...] = tuple({} for _ in others)
    used: set[str] = set()
    for name, parameter in unique.values():
        matched = [regex.pattern for regex in compiled if regex.search(name)]
        used.update(matched)
        if not parameter.requires_grad:
            frozen[name] = parameter
            continue
        first = first_match(name, [group.pattern for group in others])
        if first is not None:
            require(
                parameter.ndim == 2,
                f"{others[first].key}: {others[first].pattern!r} matches {name}, which is not a matrix;"
                " narrow the pattern",
            )
            claimed[first][name] = parameter
            continue
        if matched and parameter.ndim != 2:
            raise UserError(
                f"optimizer.block_parameters: {matched[0]!r} matches {name}, which is not a matrix;"
                " narrow the pattern"
            )
        (blocks if matched else rest)[name] = parameter
    for pattern in patterns:
        if pattern not in used:
            raise UserError(
                f"optimizer.block_parameters: {pattern!r} matches no parameter"
                f" (names look like {next(iter(unique.values()))[0]!r}, and a tied one goes by its"
                " first name); remove or correct it"
            )
    for group, found in zip(others, claimed, strict=True):
        fits = [name for name, _ in unique.values() if re.search(group.pattern, name)]
        why = "finds only what is frozen or belongs to a group before it" if fits else "matches no parameter"
        require(
            bool(found), f"{group.key}: {group.pattern!r} {why}; correct the pattern, or leave the group out"
        )
    return ParameterGroups(patterns, blocks, rest, frozen, claimed)
