"""``epochs=``: how many steps that is, which the data say."""

import math
from dataclasses import replace

from rsotrain.config.identity import cache_dir
from rsotrain.config.schema import Config
from rsotrain.config.validation import validate
from rsotrain.data.build import build_data
from rsotrain.errors import UserError
from rsotrain.parallel.ranks import World, start
from rsotrain.tracking.escaping import print_line


def settle_epochs(config: Config) -> Config:
    """``with_steps`` on the ranks that were started, before the run's name is asked for."""
    world = start(config.parallelism, config.device)
    with world.reporting_losses():
        return with_steps(config, world)


def with_steps(config: Config, world: World) -> Config:
    """``config`` with the steps that its ``epochs`` are, and from then on nothing but a run of so many steps.

    The last batch may begin the next epoch. Reading the data fills the cache, where the run finds them.
    Raises UserError as ``build_data`` does, and where the steps do not suit the schedule.
    """
    if config.epochs is None:
        return config
    data = world.in_turn(
        lambda: build_data(
            config.data,
            config.tokenizer,
            seq_len=config.seq_len,
            cache_dir=cache_dir(config),
            notify=print_line if world.is_main else lambda _: None,
            max_validation_tokens=config.evaluation.max_tokens,
        )
    )
    try:
        sequences = data.train.sequences_per_epoch()
    finally:
        data.train.close()
    if sequences is None:
        raise UserError(
            "data.streaming=true tokenises while training, so how many sequences an epoch has is not known;"
            " give steps=… instead of epochs=…, or use data.streaming=false"
        )
    # rounded, so that 3 times 0.1 epochs of 10 steps are 3 steps
    steps = max(1, math.ceil(round(config.epochs * sequences / config.batch_size, 9)))
    if world.is_main:
        print_line(f"epochs={config.epochs:g} of {sequences:,} sequences: steps={steps}")
    settled = replace(config, steps=steps, epochs=None)
    validate(settled)
    return settled
