"""Lists of configurations and W&B's sweep files: what they mean, and one sentence for each mistake."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.command import ROOT

from rsotrain.cli.check_runs import MOST_TRIED, members_of_sweep
from rsotrain.cli.sweep_file import check_sweep, configuration, main, read_list
from rsotrain.errors import UserError

SWEEPS = ROOT / "sweeps"


def written(folder: Path, text: str, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_text_and_yaml_say_the_same(tmp_path: Path) -> None:
    text = written(
        tmp_path,
        "# all\n\noptimizer=galore seed=1 data.path=/a#b # don't\n"
        "'run_name=\"a b\"' optimizer.betas=[0.9,0.99]\n",
    )
    listed = written(
        tmp_path,
        "- optimizer=galore seed=1 data.path=/a#b\n- {run_name: a b, optimizer.betas: [0.9, 0.99]}\n",
        "list.yaml",
    )
    assert read_list(text) == [
        ["optimizer=galore", "seed=1", "data.path=/a#b"],
        ['run_name="a b"', "optimizer.betas=[0.9,0.99]"],
    ]
    assert read_list(listed) == [
        ["optimizer=galore", "seed=1", "data.path=/a#b"],
        ["run_name='a b'", "optimizer.betas=[0.9,0.99]"],
    ]


def test_yaml_items_may_be_nested_and_have_comments(tmp_path: Path) -> None:
    text = "- {optimizer: {lr: 0.1, rank: 8}, seed: 1}\n- 'seed=2 # the other'\n"
    expected = [["optimizer.lr=0.1", "optimizer.rank=8", "seed=1"], ["seed=2"]]
    assert read_list(written(tmp_path, text, "list.yaml")) == expected


def test_yaml_values_reach_the_command_line_as_they_are(tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    item = {
        "grad_clip": None,
        "compile": True,
        "optimizer.lr": 1e-5,
        "data.path": "/a b/c,d='e'.gz",
        "steps": 7,
        "run_name": "null",
        "tokenizer.path": "\\\\host\\a b\\'c'\\",
        "export.path": "/données/a#1;b&c",
    }
    overrides = configuration(written(tmp_path, yaml.safe_dump([item]), "list.yaml"), 0)
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert {override.key_or_group: override.value() for override in parsed} == item


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "# nothing\n", "holds no configuration"),
        ("a.txt", "optimizer=adam seed=0,1\n", "seed=0,1 is several runs; write a configuration for each"),
        ("a.txt", "optimizer=adam\noptimzer=galore\n", "unknown key optimzer; did you mean optimizer"),
        ("a.txt", "optimizer.rnak=3\n", "unknown key optimizer.rnak; did you mean optimizer.rank"),
        ("a.txt", "=3\n", "'=3' is not of the form key=value"),
        (
            "a.txt",
            "seed=1 'run_name=a\n",
            "line 1: No closing quotation; check the quotes",
        ),
        ("a.yaml", "seed: 1\n", "must be a YAML list"),
        ("a.yaml", "- 3\n", "item 0 (line 1): write key: value pairs"),
        ("a.yaml", "- ''\n", "item 0 (line 1): write key: value pairs"),
        ("a.yaml", "- {}\n", "item 0 (line 1): write key: value pairs"),
        ("a.yaml", '- seed=0\n- "seed=1 \'run_name=a"\n', "item 1 (line 2): No closing quotation"),
        ("a.yaml", "- {optimizer: {rnak: 3}}\n", "unknown key optimizer.rnak; did you mean optimizer.rank"),
        ("a.yaml", "- [\n", "line 2: not valid YAML"),
    ],
)
def test_a_list_with_a_mistake(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_list(written(tmp_path, text, name))
    assert sentence in str(raised.value)
    assert name in str(raised.value)


def test_an_index_beyond_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "seed=0\nseed=1\n")
    for index in (2, -1):
        with pytest.raises(
            UserError, match=f"holds 2 configurations, so there is no number {index}; use --array=0-1"
        ):
            configuration(path, index)
    main([str(path), "1"])
    assert capsys.readouterr().out == "seed=1\0"
    for arguments in ([str(path), "2"], [str(tmp_path / "none")]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("rsotrain: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""


@pytest.mark.parametrize(("name", "number"), [("optimizers.yaml", 36), ("learning_rate.yaml", 32)])
def test_the_sweeps_that_are_shipped(name: str, number: int) -> None:
    assert check_sweep(SWEEPS / name, yaml.safe_load((SWEEPS / name).read_text())) == number


def test_a_cap_bounds_a_grid_and_hydras_own_keys_are_known(tmp_path: Path) -> None:
    sweep = yaml.safe_load((SWEEPS / "optimizers.yaml").read_text())
    for cap, number in ((5, 5), (100, 36)):
        assert check_sweep(tmp_path, sweep | {"run_cap": cap}) == number
    line = "hydra/launcher=submitit_local hydra.launcher.timeout_min=5"
    assert read_list(written(tmp_path, line)) == [line.split()]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"parameters": {"optimizer.rnak": {"values": [1]}}}, "unknown key optimizer.rnak; did you mean"),
        ({"parameters": {"seed": {"values": []}}}, "parameter seed has no values"),
        ({"parameters": {"seed": {"values": 3}}}, "parameter seed has no values"),
        ({"parameters": {"seed": {"vaules": [1]}}}, "parameter seed must have value, values or min and max"),
        ({"metod": "grid"}, "a sweep has no key metod; did you mean method"),
        ({"method": "gird"}, "method must be grid, random or bayes"),
        ({"run_cap": "many"}, "run_cap must be a number of runs"),
        ({"parameters": {"seed": 3}}, "parameter seed must have value, values or min and max"),
        ({"parameters": {}}, "no parameters"),
        ({"command": ["rsotrain"]}, "command must be"),
    ],
)
def test_a_sweep_with_a_mistake(
    change: dict[str, object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = yaml.safe_load((SWEEPS / "optimizers.yaml").read_text()) | change
    with pytest.raises(SystemExit):
        main([str(written(tmp_path, yaml.safe_dump(sweep), "sweep.yaml"))])
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_is_checked_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(SWEEPS / "optimizers.yaml")])
    main([str(SWEEPS / "array.txt")])
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in out] == [
        "36 runs, all of which would start", "6 runs, all of which would start",
    ]  # fmt: skip


def test_every_faulty_line_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Types, ranges, pairs, names: each line is held against all that its start would be."""
    path = written(
        tmp_path,
        "# comment\noptimizer=adam seed=0\noptimizer=adam optimizer.rank=3\n\n"
        "optimizer=galore optimizer.lr=-1\nsteps=abc\noptimizer=adam sampler=svd\n"
        "tuned=galore optimizer=rso\noptimizer=gallore\nseq_len=4000\nlr=3\nrun_name='a\n",
    )
    with pytest.raises(SystemExit) as stopped:
        main([str(path)])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *faults, last = captured.err.splitlines()
    expected = {
        3: "optimizer=adam has no key optimizer.rank", 5: "optimizer.lr=-1.0 must not be negative",
        6: "steps=abc must be a whole number", 7: "optimizer=adam has no subspace",
        8: "galore's rates, but the optimizer is rso", 9: "optimizer=gallore does not exist; did you mean ga",
        10: "seq_len=4000 is longer than", 11: "unknown key lr; it is called optimizer.lr here",
        12: "No closing quotation; check the quotes and backslashes of run_name='a",
    }  # fmt: skip
    assert len(faults) == len(expected)
    for line, (number, sentence) in zip(faults, expected.items(), strict=True):
        assert line.startswith(f"{path}, line {number}: ")
        assert sentence in line
    assert last == f"rsotrain: {path}: 9 of 10 would be refused"


def test_keys_that_do_not_exist_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_list(written(tmp_path, "optimzer=adam\nseed=0\nlr=3\n"))
    assert re.search(
        r"line 1: unknown key optimzer; .*; line 3: unknown key lr; it is called", str(raised.value)
    )


@pytest.mark.slow
def test_the_combinations_of_a_sweep_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {
        "method": "grid", "command": ["rsotrain", "${args_no_hyphens}"],
        "parameters": {
            "optimizer": {"values": ["galore", "rso"]}, "sampler": {"value": "svd"},
            "run_name": {"value": "a b"}, "grad_clip": {"value": None}, "seed": {"values": [0, 1]},
        },
    }  # fmt: skip
    path = written(tmp_path, yaml.safe_dump(sweep), "sweep.yaml")
    main([str(path)])
    assert capsys.readouterr().out == f"{path}: 4 runs, all of which would start\n"
    # each value goes with the first of the others, and some pairs do not
    sweep["parameters"] |= {  # type: ignore[operator]
        "micro_batch_size": {"values": [4, 8]}, "batch_size": {"values": [8, 4]},
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main([str(written(tmp_path, yaml.safe_dump(sweep), "sweep.yaml"))])
    fault, last = capsys.readouterr().err.splitlines()
    first = "batch_size=4 micro_batch_size=8 optimizer=galore seed=0"
    assert fault.startswith(f"{path}, {first} (and 3 more): batch_size=4 is not divisible by")
    assert last.endswith("4 of 16 would be refused")


def test_of_a_large_sweep_a_sample_is_tried() -> None:
    parameters: dict[str, dict[str, object]] = {
        "seed": {"values": list(range(50))}, "optimizer": {"values": ["adam", "galore", "rso"]},
        "optimizer.lr": {"distribution": "uniform", "min": 0.001, "max": 0.1}, "steps": {"value": 3},
    }  # fmt: skip
    members = members_of_sweep(parameters)
    assert members == members_of_sweep(parameters)
    assert len(members) == MOST_TRIED
    dealt = [Counter(column) for column in zip(*(run for _, run in members), strict=True)]
    assert [len(values) for values in dealt] == [50, 3, 2, 1]
    for values in dealt:
        assert max(values.values()) - min(values.values()) <= 1
    pairs = {(optimizer, lr) for _, (_, optimizer, lr, _) in members}
    assert len(pairs) == 6
    assert not any("steps" in place for place, _ in members)


def test_a_search_is_tried_at_the_ends_of_its_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(SWEEPS / "learning_rate.yaml")])
    assert capsys.readouterr().out.endswith(": 32 runs; 4 combinations were tried, and would start\n")
