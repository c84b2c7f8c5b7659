"""What a report says of a comparison that is not fair."""

from pathlib import Path
from typing import Any

import pytest
from helpers.report_harness import Make, call

from rsotrain.report.comparison import compare
from rsotrain.report.fairness import doubts
from rsotrain.report.runs import read_runs


def of(*folders: Path, mixed: bool = False) -> list[str]:
    return doubts(compare(read_runs(folders), mixed=mixed))


def both(make: Make, **other: Any) -> list[Path]:
    """Two methods with two seeds each; those of the second have ``other`` settings, too."""
    adam = [make(f"adam{seed}", seed=seed) for seed in (0, 1)]
    return adam + [make(f"rso{seed}", seed=seed, optimizer__name="rso", **other) for seed in (0, 1)]


def test_methods_on_one_job_with_two_seeds_raise_no_doubt(make: Make) -> None:
    assert of(*both(make)) == []
    assert of(make("alone")) == []  # there is nothing to compare


def test_one_seed(make: Make) -> None:
    folders = both(make)
    assert of(*folders[:3]) == ["One seed of rso: a difference may be chance."]
    assert of(folders[0], folders[2]) == ["One seed each: a difference may be chance."]


def test_other_precision(make: Make) -> None:
    folders = [make(f"{name}{seed}", seed=seed, optimizer__name=name, precision=precision)
               for name, precision in (("adam", "fp32"), ("rso", "bf16")) for seed in (0, 1)]  # fmt: skip
    assert of(*folders) == ["Their precision differs (fp32: adam; bf16: rso)."]


def test_unequal_tokens(make: Make) -> None:
    metrics = {"tokens": lambda step: 200 * step}
    assert of(*both(make, metrics=metrics)) == ["Unequal tokens: 4.00k for adam, 8.00k for rso."]
    # of an epoch's last batch that is shorter nobody speaks
    folders = [make(f"x{seed}", seed=seed, optimizer__name="x") for seed in (0, 1)]
    shorter = {"tokens": lambda step: 100 * step - step // 40}
    folders += [make(f"y{seed}", seed=seed, optimizer__name="y", metrics=shorter) for seed in (0, 1)]
    assert of(*folders) == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"seq_len": 64}, "seq_len is 32 there and 64 here"),
        ({"tokenizer__name": "t5"}, "tokenizer.name is trained there and t5 here"),
        ({"data__name": "c4"}, "data.name is embedded there and c4 here"),
        ({"evaluation": {"max_tokens": 5}}, "evaluation.max_tokens is "),
    ],
    ids=["layout", "tokenizer", "data", "evaluation"],
)
def test_other_validation(make: Make, settings: dict[str, Any], why: str) -> None:
    (sentence,) = of(*both(make, **settings), mixed=True)
    assert sentence.startswith(f"Losses of [a] and [b] mean different things: {why}")


def scan(make: Make, losses: dict[float, float | None], **also: Any) -> list[Path]:
    """Runs of a method with several rates, two seeds each; one without a loss has failed."""
    return [
        make(
            f"{value}-{seed}-{'-'.join(map(str, also.values()))}",
            loss or 9.0,
            seed=seed,
            finished=loss is not None,
            record={"state": "failed"} if loss is None else None,
            optimizer__scale=value,
            **also,
        )
        for value, loss in losses.items()
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ({0.1: 1.0, 0.2: 2.0}, "smallest"),
        ({0.1: 3.0, 0.2: 2.0, 0.4: 1.0}, "largest"),
        ({0.1: 3.0, 0.2: 1.0, 0.4: 2.0}, ""),
        ({0.1: 3.0, 0.2: 1.0, 0.4: None}, ""),  # what diverges was tried, and is worse
        ({0.1: 3.0}, ""),  # of one value the runs do not say what else was tried
    ],
)
def test_the_best_rate_at_the_edge_of_what_was_tried(
    make: Make, losses: dict[float, float | None], end: str
) -> None:
    adam = [make(f"adam{seed}", 5.0, seed=seed) for seed in (0, 1)]  # has no such rate
    said = of(*adam, *scan(make, losses, optimizer__name="rso"))
    assert len(said) == bool(end)
    assert all(f"is the {end} that was tried" in sentence for sentence in said)
    assert all(sentence.startswith("The optimizer.scale of rso") for sentence in said)


def test_each_rate_is_judged_with_the_other_as_it_is_in_the_best(make: Make) -> None:
    low = scan(make, {0.1: 3.0, 0.2: 2.5, 0.4: 3.0}, optimizer__lr=0.01)
    high = scan(make, {0.1: 2.0, 0.2: 1.0, 0.4: 2.0}, optimizer__lr=0.02)
    (sentence,) = of(*low, *high)
    assert sentence.startswith("The optimizer.lr of ")
    assert "is the largest that was tried" in sentence


@pytest.mark.slow
def test_the_sentences_are_on_the_page_in_markdown_and_in_the_terminal(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = both(make, precision="fp32")
    call(folders[0], folders[2], "--out", tmp_path / "report")
    sentence = "One seed each: a difference may be chance."
    assert f"\n{sentence}\n" in capsys.readouterr().out
    page = (tmp_path / "report/report.html").read_text()
    assert f"<li>{sentence}</li>" in page
    assert "<li>Their precision differs (" in page
    assert f"\n- {sentence}\n" in (tmp_path / "report/report.md").read_text()
