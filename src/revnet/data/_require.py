"""Imports of the packages that the `train` extra installs."""

from importlib import import_module
from types import ModuleType

from revnet.errors import MissingDependencyError


def require(module: str, *, package: str, purpose: str) -> ModuleType:
    """Import `module`, or raise an error that shows the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(package, purpose) from error
