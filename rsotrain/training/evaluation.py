"""Token-weighted loss, perplexity and bits per byte: the same for every batch size and world size."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.parallel.ranks import World

Batch = tuple[torch.Tensor, torch.Tensor]
Between = Callable[[], None]  # what it raises ends a long stretch of work early


def go_on() -> None:
    """The ``Between`` of those who do not stop early."""


def perplexity(loss: float) -> float:
    """exp(nats per token), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def batches_of_rank(batches: Iterable[Batch], rank: int, size: int) -> Iterator[Batch]:
    """Every ``size``-th batch from number ``rank`` on.

    A sharded model's forward passes need all ranks, so all get equally many: a rank for which the last
    round has none gets the round's first, with no target that counts.
    """
    for i, batch in enumerate(batches):
        if i % size == 0:
            own = (batch[0], torch.full_like(batch[1], IGNORE_INDEX))
        if i % size == rank:
            own = batch
        if i % size == size - 1:
            yield own
    if i % size != size - 1:
        yield own


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    bytes_per_token: float,
    legacy_divisor: bool = False,
    between: Between = go_on,
) -> dict[str, float]:
    """``val/loss`` in nats per token, ``val/perplexity`` and ``val/bits_per_byte``; all ranks call it.

    ``batches``, the same on every rank, are (inputs, targets), int64 (b, s), where targets of
    ``IGNORE_INDEX`` do not count. The sum of the losses is divided by the number of targets once, at the
    end; averaging the averages of batches would weigh short batches too much.

    ``legacy_divisor``: also ``val/legacy_loss`` and its exponential ``val/legacy_perplexity``, as the code
    of GaLore (arXiv 2403.03507) and its successors reports them. With n batches, l_i the mean loss over
    the targets of one, in nats, it is Σ l_i / (n + 1): the count of batches begins at 1, so it reads
    n / (n + 1) of what it should, and a batch weighs the same whatever its number of targets. Both make it
    depend on the batch size. Here it is that of one process, whatever the number of ranks; that code on W
    processes divides as one process with batches W times as large.

    ``between`` is called before each batch, on all ranks equally often; what it raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    try:
        sums = _sums(model, batches, world, between)
    finally:
        model.train(was_training)
    loss, legacy_loss = sums[0] / sums[1], sums[2] / (sums[3] + 1)
    metrics = {
        "val/loss": loss,
        "val/perplexity": perplexity(loss),
        "val/bits_per_byte": loss / math.log(2) / bytes_per_token,
    }
    if legacy_divisor:
        metrics |= {"val/legacy_loss": legacy_loss, "val/legacy_perplexity": perplexity(legacy_loss)}
    return metrics


def _sums(model: nn.Module, batches: Iterable[Batch], world: World, between: Between) -> list[float]:
    """Over all ranks: losses in nats, targets, mean losses of batches, batches."""
    total, means = torch.zeros(2, dtype=torch.float64, device=world.device)
    tokens = num_batches = 0
    for inputs, targets in batches_of_rank(batches, world.rank, world.size):
        between()
        counted = int((targets != IGNORE_INDEX).sum())
        loss_sum = model(inputs.to(world.device), targets.to(world.device)).double()
        total += loss_sum
        if counted > 0:  # none in what stands in for a missing batch
            means += loss_sum / counted
            num_batches += 1
        tokens += counted
    return world.sum([total.item(), tokens, means.item(), num_batches])
