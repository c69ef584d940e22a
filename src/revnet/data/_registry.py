"""Data sets by name, and the folders that have none."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from revnet.data._base import ImageDataset
from revnet.data.cifar import load_cifar10
from revnet.data.digits import load_digits
from revnet.data.parquet_folder import load_parquet_folder

_LOADERS: dict[str, Callable[[], ImageDataset]] = {
    "cifar10": load_cifar10,
    "digits": load_digits,
}


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows, sorted."""
    return sorted(_LOADERS)


def load_dataset(name_or_path: str | Path) -> ImageDataset:
    """Load a data set into memory.

    A known name comes before a folder that happens to be called the same; write `./cifar10` for the folder.

    Args:
        name_or_path: A name of `list_datasets()`, or a folder in the hub's parquet layout, see `load_parquet_folder`.

    Raises:
        ValueError: `name_or_path` is neither a known name nor a path.
        DataError: The data are missing, corrupt, of another layout, or cannot be fetched.
        MissingDependencyError: A package that reads them is not installed.
    """
    if isinstance(name_or_path, str):
        if name_or_path in _LOADERS:
            return _LOADERS[name_or_path]()
        if _is_unknown_name(name_or_path):
            close = get_close_matches(name_or_path.lower(), _LOADERS, n=1)
            way_out = f"did you mean '{close[0]}'?" if close else "pass a name or the path of a folder."
            raise ValueError(
                f"`name_or_path` (='{name_or_path}') is neither a data set of revnet ({', '.join(list_datasets())}) "
                f"nor a folder; {way_out}"
            )
    return load_parquet_folder(name_or_path)


def _is_unknown_name(text: str) -> bool:
    if text.startswith("~") or Path(text).name != text:
        return False
    # Unlike `os.path`, `Path` raises an error for a name that is too long, and takes an empty one for a folder.
    return not os.path.exists(text)  # noqa: PTH110
