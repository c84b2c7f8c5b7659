"""Token-weighted loss, perplexity and bits per byte: the same for every batch size."""

import math
from collections.abc import Iterable

import torch
from torch import nn

IGNORE_INDEX = -100


def perplexity(loss: float) -> float:
    """exp(nats per token), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    *,
    bytes_per_token: float,
) -> dict[str, float]:
    """``val/loss`` in nats per token, ``val/perplexity`` and ``val/bits_per_byte``.

    ``batches`` are (inputs, targets), int64 (b, s), where targets of ``IGNORE_INDEX`` do not count.
    The sum of the losses is divided by the number of targets once, at the end; averaging the
    averages of batches would weigh short batches too much.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for inputs, targets in batches:
        tokens += int((targets != IGNORE_INDEX).sum())
        total += model(inputs.to(device), targets.to(device)).double()
    model.train(was_training)
    loss = total.item() / tokens
    return {
        "val/loss": loss,
        "val/perplexity": perplexity(loss),
        "val/bits_per_byte": loss / math.log(2) / bytes_per_token,
    }
