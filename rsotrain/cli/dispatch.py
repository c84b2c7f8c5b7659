"""``mode=…``: which package does what the configuration asks for."""

from typing import Any

from rsotrain.benchmark.mode import benchmark_mode
from rsotrain.config.identity import cache_dir
from rsotrain.config.schema import Config, Mode
from rsotrain.errors import UserError
from rsotrain.inference import modes
from rsotrain.planner.out_of_memory import explaining_out_of_memory
from rsotrain.running.epochs import settle_epochs
from rsotrain.running.mode import train
from rsotrain.running.settled import settle_compile, settle_precision


def settle(config: Config) -> Config:
    """``config`` with what the device and the data decide, before the run's name is asked for."""
    config = settle_compile(config)
    if config.epochs is not None:
        config = settle_epochs(config)
    return settle_precision(config)


def run_mode(config: Config) -> dict[str, Any]:
    """Do what ``config.mode`` says and return the run's summary."""
    match config.mode:
        case Mode.train:
            return train(config, explaining_out_of_memory)
        case Mode.plan:
            from rsotrain.planner.mode import plan_mode  # fake tensors take a second to import

            return plan_mode(config)
        case Mode.benchmark:
            return benchmark_mode(config, explaining_out_of_memory)
        case Mode.tune:
            raise UserError("mode=tune starts several runs; say so on the command line: rsotrain mode=tune …")
        case Mode.evaluate:
            return modes.evaluate_mode(config, cache_dir(config))
        case Mode.generate:
            return modes.generate_mode(config)
        case Mode.export:
            return modes.export_mode(config)
