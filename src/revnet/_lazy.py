"""Packages whose names load when they are first used."""

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any

from revnet.errors import MissingDependencyError


def attach(
    package: str,
    homes: Mapping[str, str | tuple[str, ...]],
    *,
    submodules: Collection[str] = (),
    purpose: str | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the functions `__getattr__` and `__dir__` of a package that imports its names on first use.

    Type checkers do not run these functions. Import the names for them in an `if TYPE_CHECKING:` block. A test compares
    the block with `__all__`.

    Args:
        package: Name of the package, `__name__`.
        homes: For each exported name, the module of the package that defines it, or the modules to search in order.
        submodules: Names of submodules that are attributes of the package.
        purpose: Use of the names, for the error message if a dependency is not installed. Without it, the error is
            Python's own.
    """

    def load(name: str) -> Any:
        if name in submodules:
            return import_module(f"{package}.{name}")
        home = homes.get(name, ())
        try:
            for module_name in (home,) if isinstance(home, str) else home:
                module = import_module(f"{package}.{module_name}")
                if hasattr(module, name):
                    return getattr(module, name)
        except ModuleNotFoundError as error:
            dependency = str(error.name).partition(".")[0]
            if purpose is None or dependency in ("None", "revnet"):
                raise
            raise MissingDependencyError.of(dependency, purpose) from error
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        version = ["__version__"] if hasattr(sys.modules[package], "__version__") else []
        return sorted([*homes, *submodules, *version])

    return load, names
