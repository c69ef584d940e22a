"""Paths as users write them."""

import os
from pathlib import Path


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path in which `~` and `~name` are home directories.

    As in a shell, and unlike `Path.expanduser`, a path stays as it is if the user or the home directory is unknown.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def absolute_path(path: str | os.PathLike[str]) -> str:
    """Return a path that is the same in any working directory, without links.

    Unlike `Path.resolve`, it does not fail for a loop of links.
    """
    return os.path.realpath(expand_user(path))
