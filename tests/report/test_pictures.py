"""Pictures that can be read: by colour, by dashes, on a phone; labels that say all that differs."""

import itertools

import pytest
from helpers.report_harness import Make, make  # noqa: F401

from rsotrain.report.comparison import COLUMNS, PEAK, best_groups, compare, label_runs
from rsotrain.report.curves import AXES, curves
from rsotrain.report.plots import LOSSES
from rsotrain.report.runs import read_runs
from rsotrain.report.tables import notes, screen
from rsotrain.tracking.drawing import WIDTH, drawing_in, look, stacked_bytes
from rsotrain.tracking.theme import DARK, LIGHT, Palette

METHODS = ("adam", "galore", "rso", "apollo", "frugal", "muon", "fira", "carry", "sn_sm", "ldadam")


def rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_ten_methods_have_ten_colours_and_forty_groups_forty_looks(palette: Palette) -> None:
    looks = [(look(i, palette)["color"], str(look(i, palette)["linestyle"])) for i in range(40)]
    assert len({color for color, _ in looks[:10]}) == 10
    assert len(set(looks)) == 40
    assert len({dashes for _, dashes in looks[:10]}) == 2
    for one, other in itertools.combinations(palette.series, 2):
        assert sum((a - b) ** 2 for a, b in zip(rgb(one), rgb(other), strict=True)) ** 0.5 > 40


def test_letters_are_legible_on_a_phone(make: Make) -> None:  # noqa: F811
    for number, method in enumerate(METHODS):
        make(method, 2.0 + 0.1 * number, optimizer__name=method)
    groups = compare(read_runs([make("last", 4.0, seed=1).parent]))
    with drawing_in(LIGHT):
        figure = curves(groups, [LOSSES[0][::2]], AXES[0], LIGHT)
        figure.draw_without_rendering()
    points = min(text.get_fontsize() for text in figure.axes[0].get_xticklabels())
    phone = 370 / (WIDTH * 96)  # of a picture as wide as the page's text, in CSS pixels
    assert points * 96 / 72 * phone >= 9
    assert figure.axes[0].get_position().width > 0.75  # the names stand below, and take no room beside it


@pytest.mark.parametrize("mebibytes", [0.9, 5, 10.1, 16, 49, 101, 199, 500, 999])
def test_the_numbers_at_an_axis_of_bytes_do_not_touch(mebibytes: float) -> None:
    name = "carry randomized_svd"  # takes a third of the width
    figure = stacked_bytes([name], {"weights": [mebibytes * 2**20]})
    figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels() if tick.get_text()]
    shown = [box for box in boxes if box.x0 < figure.axes[0].get_window_extent().x1]
    assert len(shown) >= 3
    assert all(a.x1 + 4 < b.x0 for a, b in itertools.pairwise(shown))


def test_points_alone_have_an_axis_from_zero(make: Make) -> None:  # noqa: F811
    only_last = {"val/loss": lambda step: 2.0 if step == 40 else None}
    for method in ("adam", "galore"):
        make(method, optimizer__name=method, metrics=only_last)
    groups = compare(read_runs([make("rso", optimizer__name="rso", metrics=only_last).parent]))
    low, high = curves(groups, [LOSSES[0][::2]], AXES[0], LIGHT).axes[0].get_ylim()
    assert low == 0
    assert high > 2.0
    several = compare(read_runs([make("b/x", optimizer__name="rso").parent]))
    assert curves(several, [LOSSES[0][::2]], AXES[0], LIGHT).axes[0].get_ylim()[0] > 0


def test_a_label_has_all_that_differs(make: Make) -> None:  # noqa: F811
    make("a", optimizer__name="galore", optimizer__rank=4, optimizer__lr=0.1)
    make("b", optimizer__name="galore", optimizer__rank=8, optimizer__lr=0.2)
    runs = read_runs([make("c", optimizer__name="adam").parent])
    assert sorted(label_runs(runs)) == ["adam", "galore lr=0.1 rank=4", "galore lr=0.2 rank=8"]


def test_many_settings_do_not_make_a_label_of_a_line(make: Make) -> None:  # noqa: F811
    for number in (1, 2):
        make(f"r{number}", **{f"optimizer__key{i}": number * i for i in range(1, 9)})
    labels = label_runs(read_runs([make("r3", optimizer__key1=7).parent]))
    assert len(set(labels)) == 3
    assert max(map(len, labels)) < 40


def test_a_cpus_peak_is_no_ones_best(make: Make) -> None:  # noqa: F811
    """It is the process's, whose history is older than the step; a GPU's allocator knows the step's."""
    column = next(c for c in COLUMNS if c.metric == PEAK)
    for peak, method in ((5000, "adam"), (4000, "galore")):
        make(method, optimizer__name=method, metrics={PEAK: peak})
    groups = compare(read_runs([make("rso", optimizer__name="rso", metrics={PEAK: 6000}).parent]))
    assert best_groups(groups, column) == []
    assert any("peak memory is the whole process's" in note for note in notes(groups))
    for peak, method in ((5000, "a"), (4000, "b")):
        on_gpu = {PEAK: peak, "memory/gathered_and_temporaries_bytes": 100}
        make(f"gpu/{method}", optimizer__name=method, metrics=on_gpu)
    groups = compare(read_runs([make("gpu/c", optimizer__name="c", metrics=on_gpu | {PEAK: 9}).parent]))
    assert [group.label for group in best_groups(groups, column)] == ["c"]
    assert not any("whole process" in note for note in notes(groups))


def test_a_table_of_several_seeds_keeps_state_and_memory_in_80_columns(make: Make) -> None:  # noqa: F811
    state = {"memory/optimizer_state_bytes": 2000, "val/perplexity": 123.45}
    for method, seed in itertools.product(("adam", "galore"), (0, 1)):
        make(f"{method}{seed}", 2.0 + seed, optimizer__name=method, seed=seed, metrics=state)
    groups = compare(read_runs([make("adam2", 2.5, seed=2, metrics=state).parent]))
    heads = [str(column.header) for column in screen(groups, 80).columns]
    assert {"val loss", "state", "memory"} <= set(heads)
