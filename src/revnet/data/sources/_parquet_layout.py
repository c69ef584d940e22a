"""The files of a folder in the layout of the Hugging Face hub, and the rules for all of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from revnet._paths import expand_user
from revnet.data.sources._parquet_file import ParquetFile, read_parquet_file
from revnet.data.splits.rows import label_error
from revnet.errors import DataError

_TRAIN = "train"
_TESTS = ("test", "validation")
"""Possible prefixes of the files of the test split; the first with labels is used."""

_UNLABELED = -1
"""Label of an image without a published class, as in the `test-*.parquet` of ImageNet."""


@dataclass(frozen=True, eq=False)
class ParquetLayout:
    """All files of a data set, with their labels checked."""

    name: str
    """Name of the folder."""
    train: tuple[ParquetFile, ...]
    """Files of the training split, in order."""
    test: tuple[ParquetFile, ...]
    """Files of the test split, in order."""
    class_names: tuple[str, ...]
    """Names of the classes; numbers if the files have no names."""


def read_parquet_layout(path: str | Path) -> ParquetLayout:
    """Find the files in a folder, or in one directly inside it, and read everything except the images.

    Raises:
        DataError: The folder or a part of it is missing, a file is corrupt or of another layout, or a label has no
            class. The message names the file and, if there is one, the row.
        MissingDependencyError: Hugging Face `datasets` is not installed.
    """
    try:
        folder = expand_user(path)
        name = folder.name.strip(".") or folder.resolve().name
        files = _find_files(folder)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a loop of links
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    train = tuple(read_parquet_file(file) for file in files[_TRAIN])
    tests = [tuple(read_parquet_file(file) for file in files[part]) for part in _TESTS if part in files]
    test = next((part for part in tests if _has_labels(part)), tests[0])
    class_names = _class_names(train, test)
    for file in (*train, *test):
        _check_labels(file, len(class_names))
    return ParquetLayout(name, train, test, class_names)


def join_labels(files: Sequence[ParquetFile]) -> Tensor:
    """Return the checked labels of several files: (N,), int64."""
    return torch.tensor(list(chain.from_iterable(file.labels for file in files)), dtype=torch.int64)


def _find_files(folder: Path) -> dict[str, list[Path]]:
    if not folder.exists():
        raise DataError(
            f"`path` (='{folder}') does not exist; pass a folder of images or Parquet files, or a CIFAR archive."
        )
    if not folder.is_dir():
        raise DataError(f"`path` (='{folder}') must be a folder, not a file; pass '{folder.parent}'.")
    folders = [folder, *sorted(inner for inner in folder.iterdir() if inner.is_dir())]
    parts_by_folder = {inner: _parts_in(inner) for inner in folders}
    complete = [inner for inner, parts in parts_by_folder.items() if _TRAIN in parts and len(parts) > 1]
    if not complete:
        present = {part for parts in parts_by_folder.values() for part in parts}
        missing = [] if _TRAIN in present else [f"`{_TRAIN}-*.parquet`"]
        missing += [] if present & set(_TESTS) else [f"`{_TESTS[0]}-*.parquet`"]
        raise DataError(
            f"`path` (='{folder}') must hold `train-*.parquet` and `test-*.parquet` (or `validation-*.parquet`), "
            "directly or together in one inner folder; "
            f"{'it lacks ' + ' and '.join(missing) if missing else 'put them together'}."
        )
    if len(complete) > 1 and complete[0] != folder:
        names = ", ".join(inner.name for inner in complete)
        raise DataError(f"`path` (='{folder}') holds several data sets ({names}); pass the folder of one of them.")
    for part, files in parts_by_folder[complete[0]].items():
        _check_shards(part, files)
    return parts_by_folder[complete[0]]


def _parts_in(folder: Path) -> dict[str, list[Path]]:
    files_by_part = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in (_TRAIN, *_TESTS)}
    return {part: files for part, files in files_by_part.items() if files}


def _check_shards(part: str, files: list[Path]) -> None:
    # An incomplete copy would otherwise be read as a smaller data set.
    totals = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))}
    if totals and totals != {len(files)}:
        raise DataError(
            f"'{files[0].parent}' holds {len(files)} `{part}-*.parquet`, but their names mention "
            f"{' and '.join(str(total) for total in sorted(totals))}; complete the download, and keep one set of files."
        )


def _has_labels(files: Sequence[ParquetFile]) -> bool:
    return any(label != _UNLABELED for file in files for label in file.labels)


def _class_names(train: Sequence[ParquetFile], test: Sequence[ParquetFile]) -> tuple[str, ...]:
    first = train[0]
    for file in (*train, *test):
        if file.class_names != first.class_names:
            raise DataError(
                f"'{file.path}' has other class names in its metadata than '{first.path}'; "
                "write all files of a data set with the same features."
            )
    if first.class_names is not None:
        return first.class_names
    return tuple(str(label) for label in range(len({label for file in train for label in file.labels})))


def _check_labels(file: ParquetFile, num_classes: int) -> None:
    for row, label in enumerate(file.labels):
        if label is None or not 0 <= label < num_classes:
            raise label_error(f"row {row} of '{file.path}'", label, num_classes)
