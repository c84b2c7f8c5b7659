"""precision=bf16: gradients are added in float32, gains move, and a run of before goes on as it was."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ranks
from helpers.runs import compose, load_data, trainer

from rsotrain.config.identity import identity
from rsotrain.config.schema import Config, Strategy
from rsotrain.config.validation import validate
from rsotrain.data.build import Data
from rsotrain.errors import UserError
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import local
from rsotrain.training.trainer import Trainer

LONG = ["precision=bf16", "seq_len=16", "model.num_hidden_layers=1", "optimizer.lr=0"]


def summed(trained: Trainer, split: int) -> dict[str, torch.Tensor]:
    """Of one step, the float32 sum of the bfloat16 gradients of its sequences, ``split`` at a time."""
    batches = [
        (inputs[i : i + split], targets[i : i + split])
        for inputs, targets in trained.micro_batches()
        for i in range(0, len(inputs), split)
    ]
    tokens = sum(int((targets >= 0).sum()) for _, targets in batches)
    sums: dict[str, torch.Tensor] = {}
    for inputs, targets in batches:
        (trained.forward(inputs, targets) / tokens).backward()
        for group in trained.optimizer.groups:
            for name, gradient in group.gradients().items():
                sums[name] = sums.get(name, 0) + gradient.double()
        trained.optimizer.zero_grad()
    return sums


def accumulated(config: Config, data: Data, world: World) -> dict[str, torch.Tensor]:
    """The gradients that the update of a step is given: whole, by name."""
    trained = Trainer(config, data, world)
    found: dict[str, torch.Tensor] = {}

    def see() -> None:
        shards = trained.shards()
        for group in trained.optimizer.groups:
            for name, piece in group.gradients().items():
                shard = shards.get(name)
                found[name] = (shard.all_gather(piece) if shard else piece).float().clone()

    step = trained.optimizer.step
    trained.optimizer.step = lambda: (see(), step())  # type: ignore[func-returns-value,assignment]
    trained.train_step()
    return found


EXACT = 1e-6  # float32 sums in another order


def assert_near(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float, gains: float
) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert float(error) <= (gains if gradient.ndim == 1 else bound), name


@pytest.mark.parametrize("optimizer", ["adam", "rso"])
@pytest.mark.parametrize("micro_batches", [1, 8, 128, pytest.param(512, marks=pytest.mark.long)])
def test_micro_batches_are_added_in_float32(
    optimizer: str, micro_batches: int, tiny: list[str], cache_dir: Path
) -> None:
    """Added in bfloat16, 64 are 0.8 % off and 512 are 3 %."""
    batch = max(128, micro_batches)
    size = [f"batch_size={batch}", f"micro_batch_size={batch // micro_batches}"]
    config = compose([*tiny, *LONG, *size, f"optimizer={optimizer}"])
    data = load_data(config, cache_dir)
    # one batch has no sum: its gradients are rounded once to the dtype of its weights
    one = Trainer(compose([*tiny, *LONG, f"batch_size={batch}", f"optimizer={optimizer}"]), data)
    expected = summed(one, batch // micro_batches)
    assert_near(accumulated(config, data, World(torch.device("cpu"))), expected, EXACT, EXACT)


def test_one_large_batch_is_the_sum_of_its_sequences(tiny: list[str], cache_dir: Path) -> None:
    """To the rounding of one bfloat16, which is 0.17 % at random; the embedding's many tokens, too."""
    config = compose([*tiny, *LONG, "batch_size=64", "optimizer=adam"])
    data = load_data(config, cache_dir)
    expected = summed(Trainer(config, data), 1)
    assert_near(accumulated(config, data, World(torch.device("cpu"))), expected, 0.0025, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "strategy", "batch"),
    [
        (2, Strategy.fsdp, 16),
        (2, Strategy.ddp, 16),
        (4, Strategy.fsdp, 16),
        pytest.param(2, Strategy.fsdp, 512, marks=pytest.mark.long),
        pytest.param(4, Strategy.fsdp, 512, marks=pytest.mark.long),
        pytest.param(4, Strategy.ddp, 512, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_ranks_add_in_float32(
    size: int, strategy: Strategy, batch: int, tiny: list[str], cache_dir: Path, tmp_path: Path
) -> None:
    checks, expected = {}, {}
    for optimizer in ("adam", "rso"):
        for micro in (1, batch // size):  # several micro-batches, and one
            own = [*tiny, *LONG, f"batch_size={batch}", f"optimizer={optimizer}"]
            config = compose([*own, f"micro_batch_size={micro}"])
            data = load_data(config, cache_dir)
            checks[f"{optimizer}-{micro}"] = partial(accumulated, config, data)
            expected[f"{optimizer}-{micro}"] = summed(Trainer(compose(own), data), micro)
    found = ranks.run(size, checks, tmp_path, strategy)
    for name, outcomes in found.items():
        for outcome in ranks.succeeded(outcomes):
            # the gains, 1 at the start, are gathered in bfloat16, and so are the gradients that are added
            assert_near(outcome, expected[name], EXACT, 1.5e-3)


def test_every_gain_moves(tiny: list[str], cache_dir: Path) -> None:
    own = ["precision=bf16", "optimizer=adam", "optimizer.lr=0.001", "steps=20", "seq_len=16"]
    trained = trainer([*tiny, *own], cache_dir)
    gains = {n: p for n, p in trained.model.named_parameters() if p.ndim == 1}
    assert {p.dtype for p in gains.values()} == {torch.float32}
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32, torch.bfloat16}
    for _ in range(20):
        trained.train_step()
    assert sum(p.numel() for p in gains.values()) == 320
    assert all(bool((p != 1).all()) for p in gains.values())


def test_nearest_is_what_runs_did_before(tiny: list[str], cache_dir: Path) -> None:
    before = [*tiny, "precision=bf16", "optimizer.weight_rounding=nearest", "optimizer=galore"]
    assert "optimizer.weight_rounding" not in identity(compose(before))
    trained = trainer(before, cache_dir)
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}
    assert "optimizer.weight_rounding" in identity(compose([*tiny, "precision=bf16"]))


def test_float32_weights_are_not_rounded(tiny: list[str]) -> None:
    for precision in ("fp32", "bf16_mixed"):
        config = compose([*tiny, f"precision={precision}", "optimizer.weight_rounding=stochastic"])
        with pytest.raises(UserError, match=rf"those of precision={precision} are float32; leave it out"):
            validate(config)


def test_a_resumed_run_rounds_as_the_uninterrupted_one(tiny: list[str], cache_dir: Path) -> None:
    own = ["precision=bf16", "optimizer=rso", "optimizer.state_dtype=int8", "optimizer.update_proj_gap=3"]
    straight, first, second = (trainer([*tiny, *own], cache_dir) for _ in range(3))
    for _ in range(6):
        straight.train_step()
    for _ in range(2):
        first.train_step()
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        second.train_step()
    for kind in ("model", "optimizer"):
        for name, tensor in straight.state_dict()[kind].items():
            assert torch.equal(local(tensor), local(second.state_dict()[kind][name])), name
