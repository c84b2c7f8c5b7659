"""The papers' claims held against runs: each confirmed, not confirmed, or not decided by these runs.

Every rule and every margin is here; ``RULE`` says it to the reader of a report.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rsotrain.report.comparison import BYTES_KEYS, compare
from rsotrain.report.evidence import (
    Evidence,
    Figure,
    NoEvidence,
    Verdict,
    differences,
    exp,
    interval_of,
    last,
    log_of,
    mean_between,
    refresh_seconds,
    tokens_to_reach,
    values,
)
from rsotrain.report.runs import Run
from rsotrain.tracking.formats import format_bytes, format_count, format_seconds

# optimizer -> the sampler that makes it the paper's method
METHODS = {
    "adam": "none", "galore": "svd", "i3s": "importance", "osd": "online_pca", "sn_sm": "svd", "rso": "haar",
}  # fmt: skip
# "Close to Adam": nats per token; the largest published gap of the two (GaLore at 350M, 19.65 to 18.77 in
# PRAC's table 2: 0.0458; RSO's largest there: 0.042).
CLOSE = 0.046
AT = 0.005  # "at or below", nats per token: half a percent of perplexity counts as at
CLEARLY = 0.1  # lower overlap: the papers' ranges (0.3 to 0.7, 0.85 to 0.99) are 0.15 apart
FROZEN = 0.85  # overlap of a frozen subspace: the lower end of the range given for GaLore
LESS_STATE = 0.2  # of Adam's: "more than 80 % less"
RANK = ("optimizer.rank",)  # samplers are compared at one rank
SECOND_HALF = (0.5, 1.0)
QUARTERS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
RULE = (
    "Methods are compared seed by seed. A part is confirmed where the whole 95 % confidence interval of the"
    " mean (in brackets; Student's t over seeds) keeps what it says, not confirmed where the whole interval"
    " breaks it, else not decided: so one seed decides nothing but bytes, which are the same in every run."
    " A claim is confirmed by all its parts, and not confirmed if one is not."
)
LOSS, OVERLAP = last("val/loss"), "subspace/overlap"


@dataclass(frozen=True)
class Part:
    """One thing that can be true or not, with the figures that say so, or why there are none."""

    statement: str
    verdict: Verdict
    figures: str


@dataclass(frozen=True)
class Finding:
    claim: str
    paper: str  # arXiv
    parts: Sequence[Part]

    @property
    def verdict(self) -> Verdict:
        verdicts = {part.verdict for part in self.parts}
        if Verdict.refuted in verdicts:
            return Verdict.refuted
        return Verdict.undecided if Verdict.undecided in verdicts else Verdict.confirmed


def examine(runs: Sequence[Run]) -> list[Finding]:
    """All claims; none where no run is of a method that they are about.

    Runs that differ in the seed alone belong together, however a reader groups them.
    """
    evidence = Evidence(compare(runs, mixed=True), METHODS)
    if not evidence.any():
        return []
    return [
        Finding(
            "RSO and GaLore come close to Adam, and RSO keeps less for the backward pass",
            "2502.07222, 2403.03507",
            [
                _loss(evidence, "rso", "adam", CLOSE),
                _loss(evidence, "galore", "adam", CLOSE),
                _bytes(
                    evidence,
                    "rso",
                    "adam",
                    "memory/saved_activations_bytes",
                    "saved activations",
                    1.0,
                    "here adam makes its linears' inputs again in the backward, so rso keeps slightly more",
                ),
            ],
        ),
        Finding(
            "I3S ends at or below GaLore's perplexity, and its adjacent bases overlap clearly less",
            "2502.05790",
            [_loss(evidence, "i3s", "galore", AT, RANK), _overlap_is_lower(evidence)],
        ),
        Finding(
            "OSD ends at or below GaLore's perplexity, with a cheaper basis",
            "2408.12857",
            [
                _loss(evidence, "osd", "galore", AT, RANK),
                _basis_is_cheaper(evidence, per_step=False),
                _basis_is_cheaper(evidence, per_step=True),
            ],
        ),
        Finding(
            "SN-SM reaches Adam's final loss in fewer tokens, with more than 80 % less state in the blocks",
            "2411.07120",
            [
                _fewer_tokens(evidence),
                _bytes(
                    evidence, "sn_sm", "adam", "memory/block_state_bytes", "state in the blocks", LESS_STATE
                ),
            ],
        ),
        Finding(
            "The dominant subspace freezes: GaLore draws nearly the same basis again and again",
            "2502.05790",
            [_frozen(evidence)],
        ),
    ]


def _part(statement: str, examined: Callable[[], tuple[Verdict, str]]) -> Part:
    try:
        return Part(statement, *examined())
    except NoEvidence as reason:
        return Part(statement, Verdict.undecided, str(reason))


def _loss(evidence: Evidence, one: str, other: str, margin: float, also: Sequence[str] = ()) -> Part:
    def examined() -> tuple[Verdict, str]:
        pairs = evidence.pairs(one, other, also)
        difference = interval_of(differences(pairs, LOSS))
        a, b = (_perplexity(runs) for runs in zip(*pairs, strict=True))
        shown = difference.show(lambda value: f"{value:+.4f}")
        return difference.verdict(margin), f"perplexity {a:.2f} against {b:.2f}; difference of loss {shown}"

    return _part(f"the loss of {one} is at most {margin:g} nats above that of {other}", examined)


def _perplexity(runs: Iterable[Run]) -> float:
    """Geometric mean."""
    return exp(statistics.fmean(values(runs, LOSS)))


def _bytes(
    evidence: Evidence, one: str, other: str, metric: str, what: str, share: float, remark: str = ""
) -> Part:
    def examined() -> tuple[Verdict, str]:
        pairs = [(last(metric)(a), last(metric)(b)) for a, b in evidence.pairs(one, other, BYTES_KEYS)]
        sizes = [(a, b) for a, b in pairs if a is not None and b]
        if len(sizes) < len(pairs):
            raise NoEvidence(f"not all runs have {metric}")
        verdict = Verdict.confirmed if all(a < share * b for a, b in sizes) else Verdict.refuted
        ours, theirs = sizes[0]
        return verdict, f"{format_bytes(ours)} against {format_bytes(theirs)}: {ours / theirs:.3f} of it"

    than = f"{share:g} of {other}'s" if share < 1 else other
    return _part(f"{what}: {one} has less than {than}{remark and f' ({remark})'}", examined)


def _overlap_is_lower(evidence: Evidence) -> Part:
    def examined() -> tuple[Verdict, str]:
        figure = mean_between(OVERLAP, *SECOND_HALF)
        # by chance alone bases overlap by rank/dimension, and the more the fewer steps lie between them
        pairs = evidence.pairs("i3s", "galore", (*RANK, "optimizer.update_proj_gap"))
        difference = interval_of(differences(pairs, figure))
        shown = difference.show(lambda value: f"{value:+.3f}")
        i3s, galore = (_quarters(runs) for runs in zip(*pairs, strict=True))
        return (
            difference.verdict(-CLEARLY),
            f"difference {shown}; i3s by quarters {i3s}; galore by quarters {galore}",
        )

    return _part(
        f"in the second half of training the overlap of i3s is at least {CLEARLY:g} below that of galore",
        examined,
    )


def _quarters(runs: Iterable[Run]) -> str:
    """Mean overlap in each quarter of training, over the seeds."""
    means = []
    for quarter in QUARTERS:
        figures = [mean_between(OVERLAP, *quarter)(run) for run in runs]
        known = [figure for figure in figures if figure is not None]
        means.append(f"{statistics.fmean(known):.2f}" if len(known) == len(figures) else "–")
    return ", ".join(means)


def _frozen(evidence: Evidence) -> Part:
    def examined() -> tuple[Verdict, str]:
        runs = evidence.runs("galore").values()
        overlap = interval_of(values(runs, mean_between(OVERLAP, *SECOND_HALF)))
        shown = overlap.show(lambda value: f"{value:.3f}")
        return (-overlap).verdict(-FROZEN), f"{shown}; by quarters {_quarters(runs)}"

    return _part(
        f"in the second half of training adjacent bases of galore overlap by at least {FROZEN:g}", examined
    )


def _basis_is_cheaper(evidence: Evidence, *, per_step: bool) -> Part:
    figure: Figure = refresh_seconds(per_step)

    def examined() -> tuple[Verdict, str]:
        pairs = evidence.pairs("osd", "galore", ["parallelism", *RANK])
        ratio = interval_of(differences(pairs, log_of(figure)))
        ours, theirs = (statistics.fmean(values(runs, figure)) for runs in zip(*pairs, strict=True))
        shown = ratio.show(lambda value: f"{exp(value):.3g}")
        return ratio.verdict_below(
            0.0
        ), f"{format_seconds(ours)} against {format_seconds(theirs)}; ratio {shown}"

    statement = (
        "the bases cost osd less time per training step than galore"
        if per_step
        else "a draw of all bases takes osd less time than galore"
        " (whose draw here decomposes a Gram matrix into eigenvectors; the papers' is an SVD)"
    )
    return _part(statement, examined)


def _fewer_tokens(evidence: Evidence) -> Part:
    def examined() -> tuple[Verdict, str]:
        pairs = evidence.pairs("sn_sm", "adam")
        losses = interval_of(differences(pairs, LOSS))
        ours, theirs = zip(*pairs, strict=True)
        budget = values(theirs, last("tokens"))
        needed = [tokens_to_reach(run, loss) for run, loss in zip(ours, values(theirs, LOSS), strict=True)]
        reached = [n / b for n, b in zip(needed, budget, strict=True) if n is not None]
        shown = losses.show(lambda value: f"{value:+.4f}")
        if len(reached) < len(pairs):  # then at best undecided: a seed that does not get there is no evidence
            verdict = losses.verdict(0.0)
            verdict = Verdict.undecided if verdict is Verdict.confirmed else verdict
            return verdict, f"{len(reached)} of {len(pairs)} seeds reach it; difference of final loss {shown}"
        share = interval_of(reached)
        tokens = f"{format_count(share.mean * budget[0])} of {format_count(budget[0])} tokens"
        return share.verdict_below(1.0), f"{tokens}; share {share.show(lambda value: f'{value:.2f}')}"

    return _part("sn_sm reaches adam's final validation loss in fewer tokens than adam", examined)
