"""What the decorators ``@optimizer`` and ``@sampler`` share: settings, and the code that belongs to them."""

from collections.abc import Callable
from typing import TypeVar

from rsotrain.errors import UserError

Settings = TypeVar("Settings", bound=type)

# Settings -> ``module:name`` of the code, so that settings need not import torch.
CODE: dict[type, str] = {}


def registering(registry: dict[str, type], schema: str, code: str) -> Callable[[Settings], Settings]:
    """A decorator that enters settings into ``registry`` as ``schema``, and their ``code`` into ``CODE``.

    ``code``: ``module:name``; the name alone where the code stands in the module of the settings; empty:
    none. Raises UserError where there is such a schema already.
    """

    def register(settings: Settings) -> Settings:
        if schema in registry:
            other = registry[schema]
            raise UserError(
                f"{settings.__name__} is registered as {schema}, as {other.__name__} of {other.__module__} is"
                " already; give it another name"
            )
        registry[schema] = settings
        CODE[settings] = f"{settings.__module__}:{code}" if code and ":" not in code else code
        return settings

    return register
