"""The run folder: nothing outside of it is written or removed, and nothing in it is left half."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Cli
from helpers.runs import compose, trainer

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.config.schema import Config
from rsotrain.data.tokenizer import save_tokenizer
from rsotrain.errors import TrainingError, UserError
from rsotrain.running.folder import open_run_folder
from rsotrain.running.mode import train
from rsotrain.tracking.run_files import FILES
from rsotrain.training.trainer import Trainer


@pytest.fixture
def config(tiny: list[str], tmp_path: Path) -> Config:
    return compose([*tiny, "optimizer=adam", f"output_dir={tmp_path}/out", "run_name=r"])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


LINKS = [
    *FILES,
    "checkpoints",
    "tokenizer",
    "wandb",
    "tokenizer/tokenizer.model",
    "checkpoints/step_00000004",
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("target", ["there", "dangling"])
def test_a_link_out_of_the_folder_is_refused_at_the_start(
    name: str, target: str, config: Config, tmp_path: Path
) -> None:
    outside, link = tmp_path / "outside", tmp_path / "out/r" / name
    link.parent.mkdir(parents=True)
    (outside / "step_00000001").mkdir(parents=True)
    (outside / "file").write_text("mine")
    there = "file" if "." in name else ""
    link.symlink_to(outside / (there if target == "there" else "absent"))
    before = snapshot(outside)
    with pytest.raises(UserError, match=rf"{name} is a symbolic link"):
        train(config)
    assert snapshot(outside) == before
    assert sorted(p.name for p in outside.iterdir()) == ["file", "step_00000001"]
    assert link.is_symlink()


@pytest.mark.parametrize("name", [name for name in LINKS if name != ".lock"])
def test_overwriting_removes_a_link_and_not_what_it_names(name: str, config: Config, tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "out/r" / name
    link.parent.mkdir(parents=True)
    (outside / "step_00000001").mkdir(parents=True)
    (outside / "file").write_text("mine")
    link.symlink_to(outside / "file" if "." in name else outside)
    before = snapshot(outside)
    config.overwrite = True
    with open_run_folder(config):
        assert not link.is_symlink()
        assert snapshot(outside) == before


@pytest.mark.slow
def test_overwriting_a_run_whose_checkpoints_are_a_link_starts_anew(config: Config, tmp_path: Path) -> None:
    config.seed = 1
    train(config)
    run, elsewhere = tmp_path / "out/r", tmp_path / "elsewhere"
    shutil.move(run / "checkpoints", elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    config.seed, config.overwrite, config.steps = 0, True, 2
    summary = train(config)
    assert summary["step"] == 2
    assert "resumed" not in (run / "train.log").read_text()
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_00000002"]
    assert [p.name for p in list_checkpoints(elsewhere)] == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize("name", LINKS)
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str, config: Config, tmp_path: Path) -> None:
    path = tmp_path / "out/r" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{path.name} is no (file|folder)"):
        train(config)


@pytest.mark.slow
def test_what_cannot_be_cleared_is_said(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config)

    def rmtree(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    config.overwrite = True
    with pytest.raises(UserError, match="cannot be written: Device or resource busy"):
        train(config)
    assert json.loads((tmp_path / "out/r/summary.json").read_text())["step"] == 6


def during(step: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *arguments: Any) -> Any:
        if self.step + 1 == step:
            act()
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["out", "out/r"])
@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_removed_meanwhile_fails_the_run(
    what: str, again: bool, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "out/r/checkpoints/step_00000002"

    def remove() -> None:
        deadline = time.monotonic() + 60
        while not saved.is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.move(tmp_path / what, tmp_path / "away")
        if again:
            (tmp_path / "out/r").mkdir(parents=True)

    during(4, remove, monkeypatch)
    with pytest.raises(TrainingError, match="was removed or replaced while the run was at work"):
        train(config)
    assert list((tmp_path / "out/r").rglob("*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "tokenizer"])
def test_what_is_removed_from_the_folder_meanwhile_is_missed(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "out/r"
    with monkeypatch.context() as patch:
        during(4, lambda: shutil.move(run / name, tmp_path / "away"), patch)
        with pytest.raises(TrainingError, match=f"{name} was removed while the run was at work"):
            train(config)
    assert train(config)["step"] == 6
    assert (run / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("run.save_tokenizer", UserError),
        ("run.build_loggers", UserError),
        ("mode.build_display", UserError),
        ("run.write_json_atomic", TrainingError),
        ("run.unigram_loss", TrainingError),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_gets_one_sentence(
    where: str, kind: type[Exception], number: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "the file")

    monkeypatch.setattr(f"rsotrain.running.{where}", refuse)
    with pytest.raises(kind) as raised:
        train(config)
    said = str(raised.value)
    assert os.strerror(number) in said
    assert ("make room" in said) == (number == errno.ENOSPC)
    assert "\n" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "run.json", "config.yaml"])
def test_a_folder_in_the_place_of_a_file_gets_one_sentence(
    name: str, cli: Cli, tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "outputs/r" / name).mkdir(parents=True)
    result = cli(*tiny, "run_name=r")
    assert result.returncode == 2
    assert f"{name} is no file" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("identifier", ["../x", "a/b", "x" * 200])
def test_an_id_of_wandb_is_no_path(
    identifier: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", identifier)
    with pytest.raises(UserError, match="is no id of W&B"):
        train(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../x", "/x", ".."])
def test_a_models_name_is_no_path(name: str, config: Config, tmp_path: Path) -> None:
    config.run_name, config.model.name = None, name
    if name == "..":
        config.run_name = name
    with pytest.raises(UserError, match="give it a run_name without a slash"):
        train(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_bad_row_that_is_found_while_data_are_read_leaves_no_folder(
    streaming: str, tiny: list[str], corpus: tuple[Path, Path], tmp_path: Path, cache_dir: Path
) -> None:
    model = tmp_path / "tokenizer.model"
    save_tokenizer(trainer(tiny, cache_dir).data.tokenizer, tmp_path)
    (tmp_path / "tokenizer" / model.name).rename(model)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(corpus[0].read_text().splitlines(keepends=True)[:2]) + '{"text": 3\n')
    own = {
        "data.path": bad, "tokenizer": "sentencepiece", "tokenizer.path": model,
        "output_dir": tmp_path / "out", "data.streaming": streaming, "data.shuffle": "false",
    }  # fmt: skip
    chosen = dict(o.split("=", 1) for o in tiny if not o.startswith("tokenizer.")) | own
    if streaming == "true":
        chosen |= {"data.lanes": "1", "data.workers": "1"}
    with pytest.raises(UserError, match=r"bad\.jsonl: line 3 is not valid JSON"):
        train(compose([f"{key}={value}" for key, value in chosen.items()]))
    assert not (tmp_path / "out").exists()
