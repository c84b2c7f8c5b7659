"""Token-weighted loss, perplexity and bits per byte: the same for every batch size and world size."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from rsotrain.distributed import World
from rsotrain.models.loss import IGNORE_INDEX

Batch = tuple[torch.Tensor, torch.Tensor]


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
    model: nn.Module, batches: Iterable[Batch], world: World, *, bytes_per_token: float
) -> dict[str, float]:
    """``val/loss`` in nats per token, ``val/perplexity`` and ``val/bits_per_byte``; all ranks call it.

    ``batches``, the same on every rank, are (inputs, targets), int64 (b, s), where targets of
    ``IGNORE_INDEX`` do not count. The sum of the losses is divided by the number of targets once, at the
    end; averaging the averages of batches would weigh short batches too much.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens = 0
    for inputs, targets in batches_of_rank(batches, world.rank, world.size):
        tokens += int((targets != IGNORE_INDEX).sum())
        total += model(inputs.to(world.device), targets.to(world.device)).double()
    model.train(was_training)
    loss_sum, num_tokens = world.sum([total.item(), tokens])
    loss = loss_sum / num_tokens
    return {
        "val/loss": loss,
        "val/perplexity": perplexity(loss),
        "val/bits_per_byte": loss / math.log(2) / bytes_per_token,
    }
