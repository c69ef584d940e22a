"""Packages of the `train` extra, imported where they are used."""

from importlib import import_module
from types import ModuleType

from revnet.errors import MissingDependencyError


def require(module: str, *, package: str, purpose: str) -> ModuleType:
    """Import `module`, or say in one line which command installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(package, purpose) from error
