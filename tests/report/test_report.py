"""Reports of invented run folders: figures, marks, refusals, and one page that needs nothing else."""

import csv
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.report_harness import Make, call

from rsotrain.errors import UserError
from rsotrain.report.bars import MEMORY_PARTS
from rsotrain.report.comparison import COLUMNS, LOSS, THROUGHPUT, best_groups, compare, label_runs
from rsotrain.report.page import page
from rsotrain.report.plots import draw, svg_text
from rsotrain.report.runs import read_run, read_runs
from rsotrain.report.tables import comma_separated, markdown, run_list
from rsotrain.tracking.theme import COLORS


def test_seeds_are_averaged_and_the_best_is_marked(make: Make) -> None:
    make("a0", 2.0), make("a1", 2.2, seed=1)
    make("g0", 1.9, optimizer__name="galore", sampler__name="svd")
    make("g1", 2.0, optimizer__name="galore", sampler__name="svd", seed=1)
    groups = compare(read_runs([make("a2", 2.4, seed=2).parent]))
    assert [group.label for group in groups] == ["galore svd", "adam"]
    adam = groups[1].statistic("val/loss")
    assert adam is not None
    # mean and n - 1 deviation of 2.0, 2.2, 2.4, rounded as sums of doubles are
    assert adam == pytest.approx((2.2, 0.2, 3))
    text = markdown(groups)
    assert "| galore svd | **1.9500 ± 0.0707** |" in text
    assert "| adam | 2.2000 ± 0.2000 |" in text
    assert "standard deviation" in text
    table = list(csv.DictReader(io.StringIO(comma_separated(groups))))
    assert [(row["group"], row["runs"], row["val/loss best"]) for row in table] == [
        ("galore svd", "2", "1"),
        ("adam", "3", "0"),
    ]
    assert float(table[1]["val/loss"]) == adam.mean  # full precision


def test_equal_figures_are_best_for_nobody(make: Make) -> None:
    runs = read_runs([make("a", 2.0), make("b", 2.0, optimizer__lr=0.1)])
    assert all(not best_groups(compare(runs), column) for column in COLUMNS)


def test_group_by_a_setting_says_what_else_varies(make: Make) -> None:
    make("a", 2.0), make("b", 1.0, optimizer__lr=0.1), make("c", 3.0, optimizer__name="galore")
    folder = make("d", 3.5, optimizer__name="galore", seed=1).parent
    groups = compare(read_runs([folder]), ["optimizer"])
    assert [(group.label, len(group.runs), list(group.varies)) for group in groups] == [
        ("adam", 2, ["optimizer.lr"]),
        ("galore", 2, []),
    ]
    assert "The runs of adam differ in optimizer.lr, too." in markdown(groups)
    with pytest.raises(
        UserError, match=r"--group-by optimizer\.lrr: no run has .* did you mean optimizer\.lr"
    ):
        compare(read_runs([folder]), ["optimizer.lrr"])


def test_labels_are_as_short_as_tells_runs_apart(make: Make) -> None:
    make("a", optimizer__lr=0.1), make("b", optimizer__lr=0.2), make("c", optimizer__name="galore")
    runs = read_runs([make("d", optimizer__name="galore", seed=1).parent])
    assert label_runs(runs) == ["adam lr=0.1", "adam lr=0.2", "galore seed=0", "galore seed=1"]
    assert label_runs(read_runs([make("e")])) == ["e"]


def test_unfinished_runs_do_not_count_beside_finished_ones(make: Make) -> None:
    make("a", 2.0), make("b", 9.0, seed=1, finished=False, record={"state": "stopped"})
    (group,) = compare(read_runs([make("c", 2.0, seed=2).parent]))
    assert group.statistic("val/loss") == (2.0, 0.0, 2)
    assert group.status == "3 runs, stopped at 20/40"


def test_a_diverged_run_has_no_loss_and_its_group_is_not_the_best(make: Make) -> None:
    make("a", 2.0), make("b", 3.0, optimizer__name="galore")
    diverged = make("c", 1.0, seed=1)
    lines = (diverged / "metrics.jsonl").read_text().replace('"val/loss": 1.0', '"val/loss": null')
    (diverged / "metrics.jsonl").write_text(lines)
    (diverged / "summary.json").write_text('{"finished": true, "val/loss": null}')
    run = read_run(diverged)
    assert (run.last("val/loss"), run.latest("val/loss")) == (None, None)  # not that of step 30
    groups = compare(read_runs([diverged.parent]))
    assert [(group.label, group.statistic("val/loss")) for group in groups] == [
        ("adam", (2.0, None, 1)),
        ("galore", (3.0, None, 1)),
    ]
    assert not best_groups(groups, COLUMNS[0])
    assert "1 of the finished runs of adam ended without a finite loss." in markdown(groups)


def test_a_group_is_called_by_what_its_runs_share(make: Make) -> None:
    make("a"), make("b", optimizer__name="galore")
    (group,) = compare(read_runs([make("c", seed=1).parent]), ["seq_len", "seq_len"])
    assert (group.label, len(group.runs)) == ("llama_tiny", 3)


def test_pictures_of_a_finished_run_without_figures(make: Make) -> None:
    bare, other = make("a"), make("b", finished=False, seed=1)
    (bare / "metrics.jsonl").write_text('{"step": 40, "tokens": 1, "time": 1, "val/loss": 2.0}\n')
    (bare / "summary.json").write_text('{"finished": true, "val/loss": 2.0}')
    pictures = draw(compare(read_runs([bare, other])))
    assert "validation_loss_by_steps" in pictures
    assert not {"memory", "throughput"} & set(pictures)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seq_len": 64}, "seq_len is 32 there and 64 here"),
        ({"data__name": "files"}, "data.name is embedded there and files here"),
        ({"tokenizer__vocab_size": 500}, "tokenizer.vocab_size is None there and 500 here"),
    ],
)
def test_other_validation_data_is_refused_or_marked(
    settings: dict[str, Any], reason: str, make: Make
) -> None:
    runs = read_runs([make("a", 2.0), make("b", 1.0, **settings)])
    with pytest.raises(UserError, match=f"a and b cannot be compared .*{re.escape(reason)}; leave one out"):
        compare(runs)
    groups = compare(runs, mixed=True)
    assert sorted(group.mark for group in groups) == ["[a]", "[b]"]
    assert not best_groups(groups, COLUMNS[0])
    assert "mean different things: " in markdown(groups)


def test_how_training_data_are_read_does_not_matter(make: Make) -> None:
    runs = read_runs([make("a"), make("b", data__streaming=True)])
    assert len(compare(runs)) == 2  # no refusal


def test_groups_without_a_finished_run_come_last(make: Make) -> None:
    make("a", 2.0), make("b", -50.0, finished=False, record={"state": "stopped"}, optimizer__name="galore")
    groups = compare(read_runs([make("c", 3.0, optimizer__name="muon").parent]))
    assert [group.label for group in groups] == ["adam", "muon", "galore"]


def test_fingerprints_tell_whether_data_are_the_same(make: Make) -> None:
    one = make("a", data__path="/here/x.jsonl", record={"data": "f1"})
    same = make("b", data__path="/there/x.jsonl", record={"data": "f1"}, seed=1)
    other = make("c", data__path="/here/x.jsonl", record={"data": "f2"}, seed=2)
    assert len(compare(read_runs([one, same]), ["optimizer"])) == 1  # the same files at another place
    with pytest.raises(UserError, match="files are not the same"):
        compare(read_runs([one, other]))


def test_folders_that_are_no_runs_get_one_sentence_each(make: Make, tmp_path: Path) -> None:
    good = make("a")
    started = make("b")
    (started / "metrics.jsonl").write_text("")
    (started / "summary.json").unlink()
    with pytest.raises(UserError, match="b has no metrics: its run has not got to the first step"):
        read_runs([started])
    assert [run.name for run in read_runs([good.parent])] == ["a"]  # not in the way of the others
    assert len(read_runs([good, good.parent])) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty is not a run folder"):
        read_runs([empty])
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read_runs([tmp_path / "nowhere"])
    (good / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        read_runs([good])
    make("c")
    for folder in (good, good.parent / "c"):
        (folder / "config.yaml").write_text(f"steps: many\nodd: [{{{folder.name}: 1}}]\n")
    assert [group.runs[0].steps for group in compare(read_runs([good.parent]))] == [40, 40]


def test_lines_torn_by_a_kill_are_left_out(make: Make) -> None:
    folder = make("a", finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "val/lo')
    assert [record["step"] for record in read_run(folder).history] == [10, 20]


class Page(HTMLParser):
    """Collects tags, addresses and ids, and checks that the tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "link", "br"):
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "input", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_needs_nothing_else(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("a", 2.0), make("b", 2.5, seed=1)
    folder = make("c", 1.5, optimizer__name="<galore> & co").parent
    call(folder, "--out", tmp_path / "out", "--title", "A & B")
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|http-equiv", text)
    assert "&lt;galore&gt; &amp; co" in text
    assert "<galore>" not in text
    assert "<title>A &amp; B</title>" in text
    assert "prefers-color-scheme:dark" in text
    pictures = text[text.index("<svg") : text.rindex("</svg>")]
    assert not re.search("|".join(light for light, _ in COLORS.values()), pictures)
    assert "var(--series-2)" in pictures
    names = {
        "report.html", "report.md", "report.csv", "runs.csv",
        *(f"{metric}_loss_by_{axis}{suffix}" for metric in ("validation", "training")
          for axis in ("tokens", "steps", "time") for suffix in (".png", "_dark.png", ".svg")),
        *(f"{name}{suffix}" for name in ("memory", "throughput", "subspace")
          for suffix in (".png", "_dark.png", ".svg")),
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out/memory.png").read_bytes().startswith(b"\x89PNG")
    assert "report.html and 30 more files" in capsys.readouterr().out


def test_a_list_has_each_run_with_its_settings_seed_and_last_figures(make: Make) -> None:
    runs = [make("a", 2.0), make("b", 3.0, seed=1), make("c", optimizer__lr=0.5, finished=False)]
    rows = list(csv.DictReader(io.StringIO(run_list(compare(read_runs(runs))))))
    assert {row["run"]: (row["state"], row["seed"], row["optimizer.lr"]) for row in rows} == {
        run.name: (run.state.value, str(run.config["seed"]), str(run.config["optimizer.lr"]))
        for run in read_runs(runs)
    }
    assert rows[0]["group"] == rows[1]["group"] != rows[2]["group"]
    for row, run in zip(rows, read_runs(runs), strict=True):
        for metric in ("val/loss", "tokens", "time"):
            assert float(row[metric]) == run.last(metric)


@pytest.mark.slow
def test_the_same_runs_give_the_same_pictures(make: Make) -> None:
    groups = compare(read_runs([make("a"), make("b", 3.0, optimizer__lr=0.1)]))
    first, second = (
        {name: svg_text(name, figure) for name, figure in draw(groups).items()} for _ in range(2)
    )
    assert first == second


def test_curves_are_means_over_shared_steps(make: Make) -> None:
    groups = compare(read_runs([make("a", 2.0), make("b", 4.0, seed=1, finished=False)]))
    (panel,) = draw(groups)["validation_loss_by_steps"].axes
    lines = [list(zip(*line.get_data(), strict=True)) for line in panel.get_lines()]
    assert lines == [
        [(10, 32), (20, 22), (30, 12), (40, 2)],
        [(10, 34), (20, 24)],
        [(10, 32), (20, 22), (30, 12), (40, 2)],  # the mean: of the finished one
    ]
    groups = compare(read_runs([make("c", 2.0, finished=False), make("d", 4.0, seed=1, finished=False)]))
    (panel,) = draw(groups)["validation_loss_by_steps"].axes
    assert list(panel.get_lines()[2].get_ydata()) == [33, 23]  # of all while none is finished


def test_a_group_without_memory_figures_has_no_bar(make: Make) -> None:
    make("a", metrics={f"memory/{part}_bytes": None for part in MEMORY_PARTS})
    groups = compare(read_runs([make("b", optimizer__lr=0.1).parent]))
    (panel,) = draw(groups)["memory"].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["lr=0.1"]


def test_groups_beyond_the_colours_are_told_by_their_dashes(make: Make, tmp_path: Path) -> None:
    for i in range(25):
        folder = make(f"r{i}", float(i), optimizer__lr=0.1 * (i + 1)).parent
    text = page(compare(read_runs([folder])), {}, "title")
    swatches = re.findall(r'<i style="border-top:3px (\w+) var\(--series-(\d+)\)', text)
    assert len(swatches) == len(set(swatches)) == 20  # CSS lacks the dashes of the five from the 16th on
    assert swatches[5] == ("dashed", "6")
    assert swatches[10] == ("dotted", "1")


def test_what_bytes_depend_on_is_said_where_it_varies(make: Make) -> None:
    make("a", micro_batch_size=8), make("b", micro_batch_size=4, seed=1)
    make("c", optimizer__name="muon", micro_batch_size=4, parallelism={"strategy": "fsdp"})
    text = markdown(compare(read_runs([make("d", seed=2, micro_batch_size=8).parent])))
    assert "The runs of adam differ in micro_batch_size, too." in text
    assert "Groups differ in micro_batch_size, parallelism.strategy, on which bytes and tokens/s" in text


@pytest.mark.parametrize("settings", [{"steps": 80}, {"batch_size": 4}])
def test_losses_after_other_budgets_have_no_best(settings: dict[str, Any], make: Make) -> None:
    other = make("b", 3.0, metrics={"throughput/tokens_per_second": 100.0}, optimizer__lr=0.1, **settings)
    groups = compare(read_runs([make("a", 2.0), other]))
    assert not best_groups(groups, LOSS)
    assert best_groups(groups, THROUGHPUT)
    assert "No loss is the best, since they come after different numbers of steps" in markdown(groups)


def test_a_group_with_a_failed_run_is_not_the_best(make: Make) -> None:
    make("a", 2.0), make("b", 2.0, seed=1, finished=False, record={"state": "failed"})
    runs = read_runs([make("c", 3.0, optimizer__name="muon").parent])
    assert not best_groups(compare(runs), LOSS)
    assert best_groups(compare([run for run in runs if run.name != "b"]), LOSS)[0].label == "adam"


@pytest.mark.slow
def test_mistakes_on_the_command_line(make: Make, tmp_path: Path) -> None:
    folder = make("a")
    with pytest.raises(UserError, match="--every has no effect without --watch or --live"):
        call(folder, "--every", "3")
    for seconds in ("0", "nan", "inf"):
        with pytest.raises(UserError, match=f"--every {seconds} must be positive"):
            call(folder, "--live", "--every", seconds)
    for option in ("--out", "--title"):
        with pytest.raises(UserError, match=f"{option} has no effect with --live"):
            call(folder, "--live", option, "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        call(folder, "--out", tmp_path / "file" / "out")
    done = subprocess.run(
        [sys.executable, "-m", "rsotrain.report", str(tmp_path / "nowhere")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    reason = "is not a folder; give run folders, or the folder that holds them"
    assert done.stderr == f"rsotrain-report: {tmp_path}/nowhere {reason}\n"


@pytest.mark.slow
@pytest.mark.parametrize("screen", [">/dev/full", ">&-", "| true"], ids=["full", "closed", "nobody reads"])
def test_a_lost_screen_costs_no_report(screen: str, make: Make, tmp_path: Path) -> None:
    command = (
        f"set -o pipefail; {sys.executable} -m rsotrain.report {make('a')} --out {tmp_path}/out {screen}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/report.html").exists()


def test_without_matplotlib_the_fix_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'rsotrain\[report\]'"):
        call(make("a"))
