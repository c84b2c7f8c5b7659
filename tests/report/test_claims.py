"""The papers' claims held against invented runs in which they are true, false, and open."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.report_harness import Make, call
from matplotlib.image import imread

from rsotrain.cli.multirun import compare_members
from rsotrain.config.schema import ReportConfig
from rsotrain.errors import UserError
from rsotrain.report.claims import METHODS, Finding, examine
from rsotrain.report.comparison import compare
from rsotrain.report.document import claims_table, document
from rsotrain.report.evidence import Verdict, interval_of, tokens_to_reach
from rsotrain.report.runs import read_run, read_runs
from rsotrain.tracking.theme import COLORS

CONFIRMED, REFUTED, UNDECIDED = Verdict.confirmed, Verdict.refuted, Verdict.undecided
SEEDS = (2.0, 2.3, 2.1)  # Adam's losses: seeds differ far more than methods do
NOISE = (0.001, -0.002, 0.0)  # of a difference between methods; its 95 % interval is ± 0.0038 wide
WILD = (0.3, -0.3, 0.1)

Runs = Callable[..., Path]


@pytest.fixture
def runs(make: Make) -> Runs:
    """Three runs of a method: Adam's losses plus ``above`` plus ``noise``. Returns their folder."""

    def write(method: str, above: float = 0.0, noise: Sequence[float] = NOISE, **more: Any) -> Path:
        names = {"optimizer__name": method, "sampler__name": METHODS[method]}
        folders = [
            make(f"{method}{seed}", of_adam + above + error, seed=seed, **(names | more))
            for seed, (of_adam, error) in enumerate(zip(SEEDS, noise, strict=False))
        ]
        return folders[0].parent

    return write


def findings(folder: Path) -> list[Finding]:
    return examine(read_runs([folder]))


def verdicts(folder: Path, claim: int) -> list[Verdict]:
    """Of the parts of a claim, counted from 1."""
    return [part.verdict for part in findings(folder)[claim - 1].parts]


def test_an_interval_is_students() -> None:
    assert interval_of([1.0, 2.0, 3.0]).mean == 2.0
    # t of 2 degrees of freedom, 4.303, times 1/√3
    assert interval_of([1.0, 2.0, 3.0]).margin == pytest.approx(2.4843, abs=1e-4)
    assert interval_of([5.0]).margin is None
    assert interval_of([5.0]).verdict(9.0) is UNDECIDED
    assert [interval_of([1.0, 2.0, 3.0]).verdict(limit) for limit in (4.5, -0.5, 2.0)] == [
        CONFIRMED, REFUTED, UNDECIDED,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("above", "noise", "verdict"),
    [(0.04, NOISE, CONFIRMED), (0.06, NOISE, REFUTED), (0.046, NOISE, UNDECIDED), (0.0, WILD, UNDECIDED)],
)
def test_close_to_adam(runs: Runs, above: float, noise: tuple[float, ...], verdict: Verdict) -> None:
    runs("adam", noise=(0, 0, 0), metrics={"memory/saved_activations_bytes": 1000})
    runs("galore", -0.5)
    folder = runs("rso", above, noise, metrics={"memory/saved_activations_bytes": 800})
    assert verdicts(folder, 1) == [verdict, CONFIRMED, CONFIRMED]
    finding = findings(folder)[0]
    assert finding.verdict is verdict
    assert "800 B against 1000 B: 0.800 of it" in finding.parts[2].figures
    assert "over 3 seeds" in finding.parts[0].figures


def test_activations_that_are_not_fewer(runs: Runs) -> None:
    runs("adam", metrics={"memory/saved_activations_bytes": 1000})
    folder = runs("rso", metrics={"memory/saved_activations_bytes": 1000})
    assert verdicts(folder, 1) == [CONFIRMED, UNDECIDED, REFUTED]
    finding = findings(folder)[0]
    assert finding.parts[1].figures == "no finished run of galore"
    assert finding.verdict is REFUTED


@pytest.mark.parametrize(
    ("above", "overlap", "expected"),
    [
        (-0.05, 0.5, [CONFIRMED, CONFIRMED]),
        (0.0005, 0.9, [CONFIRMED, REFUTED]),  # as good as GaLore is "at"
        (0.05, 0.8, [REFUTED, UNDECIDED]),
    ],
)
def test_i3s_and_galore(
    runs: Runs, make: Make, above: float, overlap: float, expected: list[Verdict]
) -> None:
    runs("galore", 0.0, (0, 0, 0), metrics={"subspace/overlap": 0.9})
    for seed, error in enumerate((0.01, -0.01, 0.0)):
        folder = make(
            f"i{seed}", SEEDS[seed] + above + NOISE[seed], seed=seed, optimizer__name="i3s",
            sampler__name="importance", metrics={"subspace/overlap": overlap + error},
        ).parent  # fmt: skip
    assert verdicts(folder, 2) == expected


@pytest.mark.parametrize(
    ("seconds", "gap", "expected"),
    [
        (0.001, 1, [CONFIRMED, CONFIRMED]),  # a fiftieth of a draw, and GaLore draws every 40 steps
        (0.01, 1, [CONFIRMED, REFUTED]),
        (0.2, 1, [REFUTED, REFUTED]),
    ],
)
def test_the_basis_of_osd(runs: Runs, seconds: float, gap: int, expected: list[Verdict]) -> None:
    runs("galore", metrics={"subspace/refresh_seconds": 0.1}, optimizer__update_proj_gap=40)
    folder = runs("osd", metrics={"subspace/refresh_seconds": seconds}, optimizer__update_proj_gap=gap)
    assert verdicts(folder, 3) == [CONFIRMED, *expected]


def falling(end: float, at: int) -> Callable[[int], float]:
    """A validation loss that is ``end`` from step ``at`` on."""
    return lambda step: end + max(0, at - step)


@pytest.mark.parametrize(
    ("above", "at", "verdict"), [(-0.001, 20, CONFIRMED), (0.5, 20, REFUTED), (0.0, 40, UNDECIDED)]
)
def test_tokens_to_adams_loss(make: Make, above: float, at: int, verdict: Verdict) -> None:
    for seed, loss in enumerate(SEEDS):
        make(f"adam{seed}", loss, seed=seed, metrics={"memory/block_state_bytes": 1000})
        own = loss + above + (0.01 * (seed - 1) if at == 40 else 0)  # one seed does not get there
        folder = make(
            f"sn_sm{seed}", own, seed=seed, optimizer__name="sn_sm", sampler__name="svd",
            metrics={"val/loss": falling(own, at), "memory/block_state_bytes": 199},
        ).parent  # fmt: skip
    tokens, state = findings(folder)[3].parts
    assert (tokens.verdict, state.verdict) == (verdict, CONFIRMED)
    if verdict is CONFIRMED:
        assert "2.00k of 4.00k tokens; share 0.50 [0.50, 0.50] over 3 seeds" in tokens.figures
    elif verdict is REFUTED:
        assert "0 of 3 seeds reach it" in tokens.figures


def test_as_many_tokens_are_not_fewer(runs: Runs) -> None:
    runs("adam")
    tokens = findings(runs("sn_sm"))[3].parts[0]
    assert tokens.figures.startswith("4.00k of 4.00k tokens; share 1.00")
    assert tokens.verdict is REFUTED


def test_tokens_are_read_off_between_evaluations(make: Make) -> None:
    run = read_run(make("a", 2.0))  # 32, 22, 12, 2 at 1000, 2000, 3000, 4000 tokens
    assert tokens_to_reach(run, 17.0) == 2500
    assert tokens_to_reach(run, 2.0) == 4000
    assert tokens_to_reach(run, 40.0) == 1000
    assert tokens_to_reach(run, 1.9) is None


@pytest.mark.parametrize(("overlap", "verdict"), [(0.95, CONFIRMED), (0.6, REFUTED), (0.85, UNDECIDED)])
def test_a_frozen_subspace(make: Make, overlap: float, verdict: Verdict) -> None:
    for seed, error in enumerate((0.01, -0.01, 0.0)):
        folder = make(
            f"g{seed}", seed=seed, optimizer__name="galore", sampler__name="svd",
            metrics={"subspace/overlap": lambda step, e=error: 0.1 if step <= 20 else overlap + e},
        ).parent  # fmt: skip
    (part,) = findings(folder)[4].parts
    assert part.verdict is verdict
    assert f"by quarters 0.10, 0.10, {overlap:.2f}, {overlap:.2f}" in part.figures  # early steps do not count


def test_one_seed_decides_nothing_but_bytes(make: Make) -> None:
    make("a", metrics={"memory/saved_activations_bytes": 1000})
    names = {"optimizer__name": "rso", "sampler__name": "haar"}
    folder = make("r", metrics={"memory/saved_activations_bytes": 10}, **names).parent
    assert verdicts(folder, 1) == [UNDECIDED, UNDECIDED, CONFIRMED]
    assert "one seed: no spread" in findings(folder)[0].parts[0].figures


def test_what_cannot_be_compared_is_said(make: Make) -> None:
    make("a"), make("i", optimizer__name="i3s", sampler__name="importance", finished=False)
    make("g0", optimizer__name="galore", sampler__name="svd")
    make("g1", optimizer__name="galore", sampler__name="svd", optimizer__lr=1.0)
    make("o", optimizer__name="osd", sampler__name="online_pca", steps=80)
    make("s", optimizer__name="sn_sm", sampler__name="svd", seed=7)
    folder = make("h", optimizer__name="rso", sampler__name="svd").parent  # not RSO's own sampler
    said = claims_table(findings(folder))
    assert {p.verdict for f in findings(folder) for p in f.parts} == {UNDECIDED}
    assert "no finished run of rso" in said
    assert "no finished run of i3s" in said
    assert "there are 2 settings of galore; leave one" in said
    assert "sn_sm and adam share no seed" in said
    shutil.rmtree(folder / "g1")
    assert "the runs of osd and galore differ in steps" in claims_table(findings(folder))


@pytest.mark.slow
def test_a_reader_s_groups_change_no_claim(make: Make, tmp_path: Path) -> None:
    for name, rate in (("g0", 0.1), ("g1", 0.2)):
        folder = make(name, optimizer__name="galore", sampler__name="svd", optimizer__lr=rate).parent
    call(folder, "--claims", "--group-by", "optimizer", "--out", tmp_path / "out")
    assert "there are 2 settings of galore; leave one" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": {"name": "llama_tiny", "hidden_size": 64}}, "differ in model.hidden_size"),
        ({"grad_clip": 1.0}, "differ in grad_clip"),
        ({"data__packing": False}, "differ in data.packing"),
        ({"optimizer__state_dtype": "bfloat16"}, "differ in optimizer.state_dtype"),
        ({"record": {"data": "f2"}}, "the validation data of rso and adam are not the same"),
    ],
)
def test_methods_are_compared_on_one_job(runs: Runs, settings: dict[str, Any], reason: str) -> None:
    runs("adam", record={"data": "f1"})
    folder = runs("rso", **({"record": {"data": "f1"}} | settings))
    part = findings(folder)[0].parts[0]
    assert (part.verdict, reason in part.figures) == (UNDECIDED, True)


def test_where_the_same_data_lay_does_not_matter(runs: Runs) -> None:
    runs("adam", record={"data": "f1"}, data__path="here/c4")
    folder = runs("rso", record={"data": "f1"}, data__path="/there/c4")
    assert findings(folder)[0].parts[0].verdict is CONFIRMED


@pytest.mark.slow
def test_a_multirun_reports_on_what_is_beside_it_and_of_its_job(
    runs: Runs, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs("rso")
    members = sorted(runs("adam").glob("adam*"))
    make("short", steps=20, optimizer__name="galore", sampler__name="svd")
    make("trial", optimizer__lr=0.5)
    (make("torn") / "config.yaml").write_text("{")
    compare_members(members, ReportConfig(path=str(tmp_path / "report"), claims=True))
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("rsotrain: left out: ")
    text = (tmp_path / "report/report.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines() if " | 3 runs |" in line] == [
        "| adam",
        "| rso haar",
    ]
    assert "galore svd" not in text
    assert findings_of(text, "the loss of rso") == "confirmed"


def findings_of(text: str, statement: str) -> str:
    """The verdict on the part that begins so, in a report's Markdown."""
    return next(line for line in text.splitlines() if line.startswith(f"| {statement}")).split(" | ")[1]


@pytest.mark.parametrize(("key", "value"), [("rank", 8), ("update_proj_gap", 20)])
def test_samplers_are_compared_at_one_rank_and_overlaps_at_one_gap(runs: Runs, key: str, value: int) -> None:
    runs("galore", metrics={"subspace/overlap": 0.9})
    folder = runs("i3s", -0.05, metrics={"subspace/overlap": 0.5}, **{f"optimizer__{key}": value})
    loss, overlap = findings(folder)[1].parts
    assert loss.verdict == (UNDECIDED if key == "rank" else CONFIRMED)
    assert overlap.verdict == UNDECIDED
    assert overlap.figures == f"the runs of i3s and galore differ in optimizer.{key}"


@pytest.mark.parametrize(("key", "name"), [("micro_batch_size", ""), ("parallelism", ".strategy")])
def test_bytes_are_compared_at_one_size(runs: Runs, key: str, name: str) -> None:
    bytes_of = "memory/saved_activations_bytes"
    runs("adam", metrics={bytes_of: 1000}, **{key: {name[1:]: 1} if name else 1})
    folder = runs("rso", metrics={bytes_of: 10}, **{key: {name[1:]: 2} if name else 2})
    loss, _, saved = findings(folder)[0].parts
    assert (loss.verdict, saved.verdict) == (CONFIRMED, UNDECIDED)
    assert saved.figures == f"the runs of rso and adam differ in {key}{name}"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seed": 3, "finished": False, "record": {"state": "failed"}}, "x, a run of rso, has failed"),
        ({"seed": 1}, "there are two runs of rso of seed 1; leave one"),
        ({"seed": None}, "the seed of x is None"),
        ({"seed": "many"}, "the seed of x is 'many'"),
    ],
)
def test_a_run_that_spoils_the_others(runs: Runs, make: Make, settings: dict[str, Any], reason: str) -> None:
    runs("adam"), runs("rso")
    folder = make("x", optimizer__name="rso", sampler__name="haar", **settings).parent
    part = findings(folder)[0].parts[0]
    assert (part.verdict, part.figures) == (UNDECIDED, reason)


def test_staggered_draws_cost_their_share(runs: Runs) -> None:
    runs("galore", metrics={"subspace/refresh_seconds": 0.1}, optimizer__update_proj_gap=40)
    folder = runs(
        "osd", metrics={"subspace/refresh_seconds": 0.01},
        optimizer__update_proj_gap=40, optimizer__staggered=True,
    )  # fmt: skip
    draw, step = (part.figures for part in findings(folder)[2].parts[1:])
    assert draw.startswith("400.0 ms against 100.0 ms; ratio 4 ")
    assert "ratio 4 " in step  # 0.01 s a step against 0.1 s in 40


def test_figures_are_of_the_seeds_that_both_have(runs: Runs) -> None:
    runs("galore", metrics={"subspace/refresh_seconds": 0.1}, optimizer__update_proj_gap=1)
    folder = runs("osd", metrics={"subspace/refresh_seconds": 0.1}, optimizer__update_proj_gap=1)
    lines = (folder / "galore2/metrics.jsonl").read_text().replace('s": 0.1', 's": 9.0')
    (folder / "galore2/metrics.jsonl").write_text(lines)
    shutil.rmtree(folder / "osd2")
    draw = findings(folder)[2].parts[1]
    assert draw.figures.startswith("100.0 ms against 100.0 ms; ratio 1 ")
    assert draw.verdict is REFUTED  # as much is not less


@pytest.mark.slow
def test_claims_in_the_report(
    runs: Runs, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs("adam"), runs("galore", metrics={"subspace/overlap": 0.95})
    folder = runs("i3s", 0.05, metrics={"subspace/overlap": 0.4})
    call(folder, "--claims", "--out", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| **2. I3S ends at or below GaLore's perplexity" in text
    assert "| **not confirmed** |" in text
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(pictures) == 10
    assert all((tmp_path / "out" / name).is_file() for name in pictures)
    assert text.endswith("`.\n")
    page = (tmp_path / "out/report.html").read_text()
    assert '<td class="verdict refuted">not confirmed</td>' in page
    assert page.count('<tr class="claim">') == 5
    printed = capsys.readouterr().out
    assert "The papers' claims" in printed
    for name in ("validation_loss_by_tokens", "memory", "throughput", "subspace"):
        for suffix, dark in (("", False), ("_dark", True)):
            corner = imread(tmp_path / f"out/{name}{suffix}.png")[0, 0, :3]
            expected = COLORS["surface"][dark].removeprefix("#")
            assert "".join(f"{round(255 * channel):02x}" for channel in corner) == expected
    assert "claims" not in document(compare(read_runs([folder])), [], [], "title", "command")
    with pytest.raises(UserError, match=r"--claims .* leave one out"):
        call(folder, "--claims", "--live")
    with pytest.raises(UserError, match="--claims are about adam, galore"):
        call(make("muon", optimizer__name="muon"), "--claims", "--out", tmp_path / "out")
