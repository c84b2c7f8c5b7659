"""What the decorators ``@optimizer`` and ``@sampler`` share: settings, and the code that belongs to them."""

from collections.abc import Callable
from typing import TypeVar

Settings = TypeVar("Settings", bound=type)

# Settings -> ``module:name`` of the code, so that settings need not import torch.
CODE: dict[type, str] = {}


def registering(registry: dict[str, type], schema: str, code: str) -> Callable[[Settings], Settings]:
    """A decorator that enters settings into ``registry`` as ``schema``, and their ``code`` into ``CODE``."""

    def register(settings: Settings) -> Settings:
        assert schema not in registry, f"two schemas are called {schema} in {settings.__module__}"
        registry[schema] = settings
        CODE[settings] = code
        return settings

    return register
