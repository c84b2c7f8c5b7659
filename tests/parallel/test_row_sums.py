"""How RSO's gradients are divided among ranks: as torch.chunk divides them, however many ranks there are."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.runs import compose
from torch.utils._python_dispatch import TorchDispatchMode

from rsotrain.parallel import exchange
from rsotrain.parallel.row_sums import RowSums
from rsotrain.parallel.sharding import Shard
from rsotrain.planner.fake_run import fake_world

ROWS, RANK = 37, 3


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Done:
    def wait(self) -> None:
        pass


@pytest.mark.parametrize("size", [2, 3, 5, 16, 36, 37, 64, 512])
def test_each_rank_is_sent_its_rows_in_as_many_operations_for_any_number(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(["parallelism=fsdp"])
    config = replace(config, parallelism=replace(config.parallelism, world_size=size))
    gradients = {
        "a": torch.arange(ROWS * RANK, dtype=torch.float32).reshape(ROWS, RANK),
        "b": torch.arange(2.0 * 64).reshape(64, 2),
    }
    leaves = {name: torch.zeros_like(gradient, requires_grad=True) for name, gradient in gradients.items()}
    sent: list[torch.Tensor] = []

    def reduce_scatter(received: torch.Tensor, send: torch.Tensor, group: object) -> Done:
        sent.append(send.clone())
        return Done()

    monkeypatch.setattr(exchange, "reduce_scatter", reduce_scatter)
    shards = {name: Shard(tuple(g.shape), 0, 0, -(-g.shape[0] // size)) for name, g in gradients.items()}
    operations = Operations()
    with fake_world(config) as world:
        assert world.mesh is not None
        sums = RowSums([leaves], shards, world.mesh)
        with operations:
            sum((leaf * gradients[name]).sum() for name, leaf in leaves.items()).backward()  # type: ignore[union-attr]
            sums.finish()
    assert sum(operations.counts.values()) < 60
    (send,) = sent
    for piece, own in enumerate(send.view(size, -1)):
        begin = 0
        for gradient in gradients.values():
            chunks = gradient.split(-(-gradient.shape[0] // size))
            rows = chunks[piece] if piece < len(chunks) else gradient[:0]
            place = own[begin : begin + chunks[0].numel()]
            assert torch.equal(place[: rows.numel()], rows.flatten())
            assert not place[rows.numel() :].any()
            begin += chunks[0].numel()


def test_a_sum_is_under_way_while_the_next_gradients_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches, three buckets: one reduction each, waited for when the next bucket is complete."""
    config = compose(["parallelism=fsdp"])
    config = replace(config, parallelism=replace(config.parallelism, world_size=2))
    leaves = {name: torch.ones(4, 4, requires_grad=True) for name in ("first", "second", "third")}
    calls: list[str] = []

    class Work:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            calls.append(f"wait {self.name}")

    def reduce_scatter(received: torch.Tensor, send: torch.Tensor, group: object) -> Work:
        name = next(call for call in reversed(calls) if call.startswith("grad ")).removeprefix("grad ")
        calls.append(f"send {name}")
        return Work(name)

    monkeypatch.setattr(exchange, "reduce_scatter", reduce_scatter)
    shards = {name: Shard((4, 4), 0, 0, 2) for name in leaves}
    with fake_world(config) as world:
        assert world.mesh is not None
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(f"grad {name}"))
        sums = RowSums([{name: leaf} for name, leaf in leaves.items()], shards, world.mesh)
        for _ in range(2):
            x = torch.eye(4)
            for leaf in leaves.values():
                x = torch.tanh(x @ leaf)
            x.sum().backward()
        assert sums.finish().keys() == leaves.keys()
    assert calls == [
        *["grad third", "send third"],
        *["grad second", "wait third", "send second"],
        *["grad first", "wait second", "send first"],
        *["grad third", "wait first", "send third"],
        *["grad second", "wait third", "send second"],
        *["grad first", "wait second", "send first"],
        "wait first",
    ]
