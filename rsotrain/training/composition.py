"""What can be refused of a run's composition before any data is read."""

import torch

from rsotrain.config.schema import Config
from rsotrain.models.build import build_model
from rsotrain.optim.build import build_optimizer
from rsotrain.parallel.ranks import resolve_device
from rsotrain.training.model import float32_gains


def check_composition(config: Config) -> None:
    """Raise UserError if device, model, optimizer and sampler cannot be combined, before any data is read.

    Model and optimizer are built on the meta device, which takes no memory.
    """
    resolve_device(config.device)
    model = build_model(
        config.model,
        vocab_size=config.model.vocab_size or 1,
        precision=config.precision,
        device=torch.device("meta"),
        seed=config.seed,
        float32_gains=float32_gains(config),
    )
    build_optimizer(
        model,
        config.optimizer,
        config.sampler,
        precision=config.precision,
        seed=config.seed,
        total_steps=config.steps,
    )
