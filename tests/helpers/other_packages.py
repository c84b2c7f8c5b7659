"""Other packages' optimizers, imported without what they would bring along."""

import importlib.util
import sys
import types

import pytest


def package_without_init(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules of an installed package importable one by one, its ``__init__`` never run.

    For those that want bitsandbytes there. Skips the test where the package is missing.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{name} is not installed")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, name, package)
