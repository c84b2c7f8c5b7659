"""Token-weighted loss, perplexity and bits per byte, independent of batch size and world size."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.parallel.ranks import World

Batch = tuple[torch.Tensor, torch.Tensor]
Between = Callable[[], None]  # raises an exception to end a long computation early


def go_on() -> None:
    """The ``Between`` that never ends a computation early."""


def perplexity(loss: float) -> float:
    """exp(loss), ``loss`` in nats per token; infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def batches_of_rank(batches: Iterable[Batch], rank: int, size: int) -> Iterator[Batch]:
    """Every ``size``-th batch, starting with the batch of index ``rank``.

    A sharded model's forward passes need all ranks, so all ranks get equally many batches: a rank without a
    batch in the last round gets the first batch of that round with all targets ignored.
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

    ``legacy_divisor``: also return ``val/legacy_loss`` and its exponential ``val/legacy_perplexity``, as the
    code of GaLore (arXiv 2403.03507) and its successors report them. For n batches with mean losses l_i, in
    nats per target, this loss is Σ l_i / (n + 1). Their count of batches begins at 1, so the loss is too
    small by the factor n / (n + 1), and all batches have the same weight whatever their number of targets.
    For both reasons it depends on the batch size. Here it is the loss of one process, whatever the number of
    ranks; their code on W processes gives the loss of one process with batches W times as large.

    ``between`` is called before each batch, on all ranks equally often; an exception from it ends the
    evaluation.
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
    """Sums over all ranks: losses in nats, targets, mean losses of batches, number of batches."""
    total, means = torch.zeros(2, dtype=torch.float64, device=world.device)
    tokens = num_batches = 0
    for inputs, targets in batches_of_rank(batches, world.rank, world.size):
        between()
        counted = int((targets != IGNORE_INDEX).sum())
        loss_sum = model(inputs.to(world.device), targets.to(world.device)).double()
        total += loss_sum
        if counted > 0:  # a batch that replaces a missing one has none
            means += loss_sum / counted
            num_batches += 1
        tokens += counted
    return world.sum([total.item(), tokens, means.item(), num_batches])
