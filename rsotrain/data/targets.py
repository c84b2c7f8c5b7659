"""Which targets count."""

import torch

IGNORE_INDEX = -100  # of a target that does not count; the default of torch's cross-entropy


def valid_positions(targets: torch.Tensor) -> torch.Tensor | None:
    """Which positions (batch, seq_len) the loss depends on, those up to the last target; None: all.

    Attention looks back only, so nothing behind a sequence's last target, such as padding, has a gradient.
    """
    last = (targets != IGNORE_INDEX).flip(1).cumsum(1).flip(1)
    return None if bool((last > 0).all()) else last > 0
