"""Streaming, import, samples and export on several ranks: as on one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.huggingface import tensors, write_folder
from helpers.run_folders import assert_near, stopping, weights
from helpers.runs import compose, load_data

from rsotrain.checkpoints.files import list_checkpoints
from rsotrain.cli.dispatch import run_mode
from rsotrain.config.schema import Config, Strategy
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import local, shard_of
from rsotrain.running.mode import train
from rsotrain.training.trainer import Trainer

pytestmark = pytest.mark.slow  # ranks that train for all of them

BATCH = 8
RUN = [
    "data.streaming=true",
    "data.lanes=4",
    "data.workers=1",
    "steps=6",
    "save_every=2",
    "optimizer.eps=1e-4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streamed")


def config(tiny: list[str], folder: Path, name: str, *extra: str) -> Config:
    chosen = dict(o.split("=", 1) for o in [*tiny, *RUN, f"batch_size={BATCH}", *extra])
    return compose([f"{k}={v}" for k, v in (chosen | {"output_dir": folder, "run_name": name}).items()])


def test_a_streamed_run_goes_on_on_other_numbers_of_ranks(tiny: list[str], folder: Path) -> None:
    straight = train(config(tiny, folder, "straight"))
    for size, step in ((2, 3), (4, 5)):
        stopped = partial(stopping, config(tiny, folder, "r", "parallelism=fsdp"), step, 0)
        outcome = ranks.run(size, {"stopped": stopped}, folder / str(size), Strategy.fsdp)
        assert ranks.succeeded(outcome["stopped"]) == [75] * size
        newest = list_checkpoints(folder / "r/checkpoints")[-1]
        saved = json.loads((newest / "trainer.json").read_text())
        assert (saved["sequences"], sorted(saved["data"]["lanes"])) == (step * BATCH, ["0", "1", "2", "3"])
    resumed = train(config(tiny, folder, "r"))
    assert resumed["tokens"] == straight["tokens"]
    assert resumed["val/loss"] == pytest.approx(straight["val/loss"], rel=1e-4)
    assert_near(weights(folder / "r", 6), weights(folder / "straight", 6))


def test_a_sharded_checkpoint_is_exported_like_a_whole_one(tiny: list[str], folder: Path) -> None:
    newest = "step_00000005"
    assert (folder / "r/checkpoints" / newest / "model").is_dir()
    path = f"checkpoint.path={folder / 'r/checkpoints' / newest}"
    out = folder / "exported"
    run_mode(config(tiny, folder, "x", "mode=export", path, f"export.path={out}"))
    saved = weights(folder / "r", 5)
    exported = tensors(out)
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def imported(settings: Config, cache_dir: Path, world: World) -> tuple[Any, Any]:
    trainer = Trainer(settings, load_data(settings, cache_dir), world)
    pieces = {
        n: (shard_of(p).dim, shard_of(p).start, local(p).clone()) for n, p in trainer.model.named_parameters()
    }
    return pieces, trainer.generate()


def test_every_rank_imports_its_piece_and_writes_the_same_samples(
    tiny: list[str], folder: Path, cache_dir: Path
) -> None:
    source = write_folder(folder / "hf")
    chosen = [o for o in tiny if not o.startswith(("model=", "data.streaming"))]
    settings = compose(
        [*chosen, "model=pretrained", f"model.init_from={source}", "generate.max_new_tokens=4"]
    )
    check = {"imported": partial(imported, settings, cache_dir)}
    whole, texts = imported(settings, cache_dir, World(torch.device("cpu")))
    stored = tensors(source)
    assert all(torch.equal(piece, stored[name]) for name, (_, _, piece) in whole.items())
    outcome = ranks.run(2, check, folder / "imported")["imported"]
    for pieces, written in ranks.succeeded(outcome):
        assert written == texts
        for name, (dim, start, piece) in pieces.items():
            expected = stored[name] if dim is None else stored[name].narrow(dim, start, piece.shape[dim])
            assert torch.equal(piece, expected), name
