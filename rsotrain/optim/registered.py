"""The code that is registered for settings (``rsotrain.config.registry``)."""

import importlib
from typing import Any

from rsotrain.config.methods import OptimizerConfig
from rsotrain.config.registry import CODE
from rsotrain.optim.base import ParamGroupOptimizer


def code_of(settings: type) -> Any:
    """The class or function registered for the class ``settings``; None where none is registered."""
    assert settings in CODE, f"{settings.__name__} names no code: write @optimizer or @sampler above it"
    if not CODE[settings]:
        return None
    module, _, name = CODE[settings].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        registry = settings.__module__.replace(".", "/") + ".py"
        raise AssertionError(f"{registry} names {CODE[settings]} for {settings.__name__}: {error}") from error


def method_of(config: OptimizerConfig) -> type[ParamGroupOptimizer]:
    """The class that updates the attention and MLP weights."""
    return code_of(type(config))
