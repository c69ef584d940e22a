"""Packages whose names load when they are first used."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from revnet.errors import MissingDependencyError


def attach(
    package: str, file: str, *, purpose: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package that imports its names on first use.

    The names and their modules stand in the stub file of the package, `__init__.pyi`, which type checkers read, too. A
    submodule, imported there from the package itself, is an attribute but is not in `__all__`.

    Args:
        package: Name of the package, `__name__`.
        file: Path of its `__init__.py`, `__file__`.
        purpose: Use of the names, for the error message if a dependency is not installed. Without it, the error is
            Python's own.
    """
    submodules, homes, defined = read_stub(package, Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))

    def load(name: str) -> Any:
        if name in submodules:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(homes[name]), name)
        except ModuleNotFoundError as error:
            dependency = str(error.name).partition(".")[0]
            if purpose is None or dependency in ("None", "revnet"):
                raise
            raise MissingDependencyError.of(dependency, purpose) from error
        except RuntimeError as error:
            if not is_foreign_torchvision(error):
                raise
            raise MissingDependencyError.of_torchvision() from error

    def names() -> list[str]:
        return sorted({*homes, *submodules, *defined})

    return load, names, sorted(homes, key=str.casefold)


def is_foreign_torchvision(error: BaseException) -> bool:
    """Return whether an import failed because torchvision was built for another PyTorch."""
    text = str(error)
    # PyPI's torchvision is built with CUDA. Its operators cannot load next to a PyTorch for the CPU.
    return isinstance(error, RuntimeError) and text.startswith("operator torchvision::") and "does not exist" in text


def read_stub(package: str, stub: str) -> tuple[set[str], dict[str, str], set[str]]:
    """Read a stub.

    Returns:
        The submodules that it imports from its own package, the module of each other name that it imports, and the
        names that the package itself defines.
    """
    submodules: set[str] = set()
    homes: dict[str, str] = {}
    defined: set[str] = set()
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom) and node.module == package:
            submodules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            homes.update((alias.name, node.module) for alias in node.names)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    return submodules, homes, defined
