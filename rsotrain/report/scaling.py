"""Loss over model size: each method's power law, and its advantage over Adam at each size."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rsotrain.config.identity import FREE_KEYS, OPERATIONAL_KEYS
from rsotrain.report.comparison import LOSS, REPLICATE_KEY, Group, differing_keys, is_among, label_runs
from rsotrain.report.evidence import OWN_KEYS, Interval, exp, interval_of
from rsotrain.report.fairness import RATE_KEYS, SLACK
from rsotrain.report.records import number_of
from rsotrain.tracking.drawing import label, look, new_figure
from rsotrain.tracking.escaping import for_csv, for_markdown
from rsotrain.tracking.formats import format_count
from rsotrain.tracking.theme import Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST = 3  # sizes, for a law to be fitted
# What may differ between the sizes of one line: how large a model is, how long it is trained, its rates.
_FREE = {
    "model", "steps", "epochs", "batch_size", "lr_scheduler.warmup_steps", REPLICATE_KEY,
    *RATE_KEYS, *FREE_KEYS, *OPERATIONAL_KEYS,
}  # fmt: skip
NOTE = (
    "A model's size is the number of its attention and MLP weights. At each size only runs of the same number"
    " of tokens count, and of several rates the best. Dotted: L = a·N^−b by least squares of log L; of so few"
    " sizes it is a description, no forecast. In brackets: perplexity against Adam's at that size."
)


@dataclass(frozen=True)
class Size:
    """A method at one size. ``parameters``: attention and MLP weights; ``tokens``: of training."""

    parameters: int
    tokens: float
    loss: Interval


@dataclass(frozen=True)
class Line:
    """A method; ``sizes`` ascend. Its law is L = exp(``intercept``) · N^−``exponent``.

    ``job``: validation data and settings that are not the method's own, equal for lines that compare.
    """

    name: str
    method: object
    job: tuple[Any, ...]
    sizes: Sequence[Size]
    intercept: float
    exponent: float

    def law(self, parameters: float) -> float:
        return exp(self.intercept - self.exponent * math.log(parameters))

    def at(self, parameters: int) -> Size | None:
        return next((size for size in self.sizes if size.parameters == parameters), None)


class _Tried(NamedTuple):
    group: Group
    parameters: int
    tokens: float
    loss: Interval


def block_parameters(config: Mapping[str, Any]) -> int | None:
    """Weights of attention and MLP, of flat settings; None where these do not say."""

    def number(key: str, default: float | None = None) -> float:
        value = config.get(f"model.{key}")
        found = number_of(value) if value is not None else default
        return 0.0 if found is None else found

    hidden, intermediate = number("hidden_size"), number("intermediate_size")
    layers, heads = number("num_hidden_layers"), number("num_attention_heads")
    if min(hidden, intermediate, layers, heads) < 1:
        return None
    shared, size = number("num_key_value_heads", heads), number("head_dim", hidden / heads)
    total = layers * hidden * (2 * size * (heads + shared) + 3 * intermediate)
    return round(total) if min(shared, size) >= 1 and math.isfinite(total) else None


def lines_of(groups: Sequence[Group]) -> list[Line]:
    """The methods that were trained at several sizes, the one with the lowest loss at the largest first.

    Left out are groups of which a run has failed or ended without a finite loss, those that differ in more
    than the seed, and at each size those with other numbers of tokens than most have there.
    """
    methods: dict[tuple[Any, ...], dict[int, list[_Tried]]] = {}
    points = [point for group in groups if (point := _tried(group)) is not None]
    for tried in _of_usual_tokens(points):
        of_method = methods.setdefault(_settings_of(tried.group), {})
        of_method.setdefault(tried.parameters, []).append(tried)
    best = [
        [min(of_method[n], key=lambda each: each.loss.mean) for n in sorted(of_method)]
        for of_method in methods.values()
        if len(of_method) >= FEWEST
    ]
    firsts = [found[0].group.runs[0] for found in best]
    keys = dict.fromkeys(["optimizer.name", *differing_keys(firsts)])
    names = label_runs(firsts, [key for key in keys if not is_among(key, _FREE)])
    lines = []
    for found, first, name in zip(best, firsts, names, strict=True):
        group, sizes = found[0].group, [Size(each.parameters, each.tokens, each.loss) for each in found]
        method, job = first.config.get("optimizer.name"), _settings_of(group, without=OWN_KEYS)
        lines.append(Line(f"{name} {group.mark}".strip(), method, job, sizes, *_fitted(sizes)))
    return sorted(lines, key=lambda line: line.sizes[-1].loss.mean)


def _tried(group: Group) -> _Tried | None:
    """What the group is a point of; None where it is none."""
    found = [run.last(LOSS.metric) for run in group.finished]
    losses = [loss for loss in found if loss is not None and loss > 0]
    parameters, tokens = block_parameters(group.runs[0].config), group.statistic("tokens")
    varies = any(not is_among(key, OPERATIONAL_KEYS) for key in group.varies)
    if parameters is None or tokens is None or group.failed or varies:
        return None
    if not losses or len(losses) < len(found):
        return None
    return _Tried(group, parameters, tokens.mean, interval_of(losses))


def _of_usual_tokens(points: Sequence[_Tried]) -> list[_Tried]:
    """At each size those with the number of tokens that most have there, the larger one of two."""
    usual: dict[int, float] = {}
    for parameters in {point.parameters for point in points}:
        tokens = [point.tokens for point in points if point.parameters == parameters]
        usual[parameters] = max(tokens, key=lambda n: (sum(_alike(n, other) for other in tokens), n))
    return [point for point in points if _alike(point.tokens, usual[point.parameters])]


def _alike(tokens: float, others: float) -> bool:
    return abs(tokens - others) <= SLACK * max(tokens, others)


def _settings_of(group: Group, without: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """What is the same at all sizes; a rank counts as a share of the hidden size."""
    config = dict(group.runs[0].config)
    rank, hidden = config.get("optimizer.rank"), number_of(config.get("model.hidden_size"))
    if isinstance(rank, int) and hidden:
        config["optimizer.rank"] = rank / hidden
    kept = (key for key in sorted(config) if not is_among(key, _FREE) and not key.startswith(without))
    return (group.mark, *((key, str(config[key])) for key in kept))


def _fitted(sizes: Sequence[Size]) -> tuple[float, float]:
    """Intercept and exponent of log L = intercept − exponent · log N."""
    fit = statistics.linear_regression(
        [math.log(size.parameters) for size in sizes], [math.log(size.loss.mean) for size in sizes]
    )
    return fit.intercept, -fit.slope


# --- tables ----------------------------------------------------------------------------------------------


def _all_sizes(lines: Sequence[Line]) -> list[int]:
    return sorted({size.parameters for line in lines for size in line.sizes})


def _against_adam(lines: Sequence[Line], line: Line, parameters: int) -> float | None:
    """By how much the perplexity differs, as a share, from that of Adam's best line on the same job."""
    adam = next((other for other in lines if other.method == "adam" and other.job == line.job), None)
    own, theirs = line.at(parameters), adam.at(parameters) if adam else None
    if own is None or theirs is None or line is adam:
        return None
    return exp(own.loss.mean - theirs.loss.mean) - 1.0


def _tokens_of(lines: Sequence[Line], parameters: int) -> str:
    """How many tokens of training each weight of this size has had."""
    tokens = next(size.tokens for line in lines if (size := line.at(parameters)))
    return f"{tokens / parameters:.3g}"


def scaling_cells(lines: Sequence[Line]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads, and of each method its name and its cells; the first row has the tokens of each weight."""
    sizes = _all_sizes(lines)
    rows = [("tokens for each weight", [*(_tokens_of(lines, n) for n in sizes), ""])]
    for line in lines:
        cells = []
        for parameters in sizes:
            size, change = line.at(parameters), _against_adam(lines, line, parameters)
            text = "–" if size is None else LOSS.form(size.loss.mean)
            text += f" ± {LOSS.form(size.loss.margin)}" if size and size.loss.margin is not None else ""
            cells.append(text if change is None else f"{text} ({100 * change:+.1f} %)")
        rows.append((line.name, [*cells, f"{line.exponent:.4f}"]))
    return [*(format_count(n) for n in sizes), "b"], rows


def scaling_markdown(lines: Sequence[Line]) -> str:
    heads, rows = scaling_cells(lines)
    table = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    table += [f"| {for_markdown(name)} | {' | '.join(map(for_markdown, cells))} |" for name, cells in rows]
    return "\n".join(table)


def scaling_csv(lines: Sequence[Line]) -> str:
    """A line for each method and size, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["method", "parameters", "tokens", LOSS.metric, "95 % margin", "seeds"]
    writer.writerow([*heads, "perplexity against adam", "law", "exponent"])
    for line in lines:
        for size in line.sizes:
            change = _against_adam(lines, line, size.parameters)
            loss, law = size.loss, line.law(size.parameters)
            row = [size.parameters, size.tokens, loss.mean, loss.margin, loss.number, change, law]
            writer.writerow([for_csv(line.name), *row, line.exponent])
    return text.getvalue()


# --- the picture -----------------------------------------------------------------------------------------


def scaling_picture(lines: Sequence[Line], palette: Palette) -> "Figure":
    """Both axes logarithmic, so that a power law is straight."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    figure = new_figure(4.4 + 0.12 * len(lines))
    panel = figure.subplots()
    handles = []
    for index, line in enumerate(lines):
        xs, style = [size.parameters for size in line.sizes], look(index, palette)
        ys = [size.loss.mean for size in line.sizes]
        margins = [size.loss.margin or 0.0 for size in line.sizes]
        panel.plot(xs, [line.law(x) for x in xs], color=style["color"], linestyle=":", linewidth=1.2)
        panel.errorbar(xs, ys, yerr=margins, color=style["color"], linestyle="none", elinewidth=1.2)
        (handle,) = panel.plot(xs, ys, marker="o", markersize=5.5, **style)
        handles.append(handle)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(NullLocator())
    panel.xaxis.set_minor_locator(NullLocator())
    sizes = _all_sizes(lines)
    panel.set_xticks(sizes, [format_count(n) for n in sizes])
    panel.yaxis.set_major_locator(MaxNLocator(6))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:.4g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("attention and MLP weights")
    panel.set_ylabel("validation loss (nats per token)")
    panel.grid(visible=False, axis="x")
    names = [label(line.name, 24, 2) for line in lines]
    figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=2.6, labelspacing=0.4)
    return figure
