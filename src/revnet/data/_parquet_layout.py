"""The files of a folder in the layout of the Hugging Face hub, and the rules that hold across them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from revnet.data._parquet_file import ParquetFile, read_parquet_file
from revnet.data._rows import label_error
from revnet.errors import DataError

_TRAIN = "train"
_TESTS = ("test", "validation")
"""What the files of the test split may be called; the first with labels is taken."""

_UNLABELLED = -1
"""How the hub marks an image whose class is kept secret, as in the `test-*.parquet` of ImageNet."""


@dataclass(frozen=True, eq=False)
class ParquetLayout:
    """All files of a data set, with their labels checked."""

    name: str
    """What the folder is called."""
    train: tuple[ParquetFile, ...]
    """The files of the training split, in order."""
    test: tuple[ParquetFile, ...]
    """Those of the test split."""
    class_names: tuple[str, ...]
    """The name of each class, a number where the files have none."""


def read_parquet_layout(path: str | Path) -> ParquetLayout:
    """Find the files in a folder, or in one directly inside it, and read all but the images.

    Raises:
        DataError: The folder or a part of it is missing, a file is corrupt or of another layout, or a label has no
            class. The message names the file and, where there is one, the row.
        MissingDependencyError: Hugging Face `datasets` is not installed.
    """
    try:
        folder = Path(path).expanduser()
        name = folder.name.strip(".") or folder.resolve().name
        found = _find_files(folder)
    except (OSError, RuntimeError) as error:  # not allowed to look, a name too long; `~` of an unknown user
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    train = tuple(read_parquet_file(file) for file in found[_TRAIN])
    tests = [tuple(read_parquet_file(file) for file in found[part]) for part in _TESTS if part in found]
    test = next((files for files in tests if _has_labels(files)), tests[0])
    class_names = _class_names(train, test)
    for file in (*train, *test):
        _check_labels(file, len(class_names))
    return ParquetLayout(name, train, test, class_names)


def join_labels(files: Sequence[ParquetFile]) -> Tensor:
    """The checked labels of several files: (N,), int64."""
    return torch.tensor(list(chain.from_iterable(file.labels for file in files)), dtype=torch.int64)


def _find_files(folder: Path) -> dict[str, list[Path]]:
    if not folder.exists():
        raise DataError(f"`path` (='{folder}') does not exist; pass the folder of a data set.")
    if not folder.is_dir():
        raise DataError(f"`path` (='{folder}') must be a folder, not a file; pass '{folder.parent}'.")
    places = [folder, *sorted(inner for inner in folder.iterdir() if inner.is_dir())]
    found = {place: _parts_in(place) for place in places}
    complete = [place for place, parts in found.items() if _TRAIN in parts and len(parts) > 1]
    if not complete:
        present = {part for parts in found.values() for part in parts}
        lacking = [] if _TRAIN in present else [f"`{_TRAIN}-*.parquet`"]
        lacking += [] if present & set(_TESTS) else [f"`{_TESTS[0]}-*.parquet`"]
        raise DataError(
            f"`path` (='{folder}') must hold `train-*.parquet` and `test-*.parquet` (or `validation-*.parquet`) in one "
            "place, the folder itself or one directly inside it; "
            f"{'it lacks ' + ' and '.join(lacking) if lacking else 'put them together'}."
        )
    if len(complete) > 1 and complete[0] != folder:
        names = ", ".join(place.name for place in complete)
        raise DataError(f"`path` (='{folder}') holds several data sets ({names}); pass the folder of one of them.")
    for part, files in found[complete[0]].items():
        _check_shards(part, files)
    return found[complete[0]]


def _parts_in(place: Path) -> dict[str, list[Path]]:
    found = {part: sorted(place.glob(f"{part}-*.parquet")) for part in (_TRAIN, *_TESTS)}
    return {part: files for part, files in found.items() if files}


def _check_shards(part: str, files: list[Path]) -> None:
    # A folder that was copied in part would otherwise pass for a smaller data set.
    totals = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))}
    if totals and totals != {len(files)}:
        raise DataError(
            f"'{files[0].parent}' holds {len(files)} `{part}-*.parquet`, but their names speak of "
            f"{' and '.join(str(total) for total in sorted(totals))}; complete the download, and keep one set of files."
        )


def _has_labels(files: Sequence[ParquetFile]) -> bool:
    return any(label != _UNLABELLED for file in files for label in file.labels)


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
