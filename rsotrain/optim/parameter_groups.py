"""Parameter groups: each parameter is in exactly one, by regular expressions on its name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from rsotrain.errors import UserError


@dataclass(frozen=True)
class ParameterGroups:
    """``blocks``: the attention and MLP weights that the patterns match, which the method trains; ``rest``:
    all other trained parameters; ``frozen``: the parameters that are not trained."""

    patterns: tuple[str, ...]
    blocks: dict[str, nn.Parameter]
    rest: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]

    def renewed(self, model: nn.Module) -> "ParameterGroups":
        """The same groups with the parameters of ``model``, which have the same names."""
        now = dict(model.named_parameters())
        blocks, rest, frozen = (
            {name: now[name] for name in group} for group in (self.blocks, self.rest, self.frozen)
        )
        return ParameterGroups(self.patterns, blocks, rest, frozen)


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
    model: nn.Module | Iterable[tuple[str, nn.Parameter]], patterns: Iterable[str]
) -> ParameterGroups:
    """Assign each parameter to a group; a tied parameter counts once, under its first name.

    Raises UserError for a pattern that is no regular expression or matches no parameter, and for a
    matched parameter that is not a matrix.
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
    used: set[str] = set()
    for name, parameter in unique.values():
        matched = [regex.pattern for regex in compiled if regex.search(name)]
        used.update(matched)
        if not parameter.requires_grad:
            frozen[name] = parameter
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
    return ParameterGroups(patterns, blocks, rest, frozen)
