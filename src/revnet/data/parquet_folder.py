"""A folder of labelled images in the layout of the Hugging Face hub: `train-*.parquet` beside `test-*.parquet`.

CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST and many others lie on the hub like this.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from revnet.data._base import ImageDataset, ImageSplit
from revnet.data._parquet_file import ParquetImages, read_parquet_file
from revnet.errors import DataError

_PARTS = ("train", "test")


def load_parquet_folder(path: str | Path, *, name: str | None = None) -> ImageDataset:
    """Load the data set that lies in a folder.

    The files may lie in the folder or in one folder directly inside it, as in a clone of a hub repository. Each has a
    column of encoded images (`img` or `image`) and one of integer labels (`label` or `fine_label`); others are not
    read. All images must have one size and be all grey or all RGB. Class names come from the schema's metadata. Without
    them the classes are called by their numbers, and the training labels must be 0..K-1 with none missing.

    Every image is decoded on loading. Nothing is written, so the folder can be read-only: decoding CIFAR-10 takes
    seconds, and a cache of decoded images would save little.

    Args:
        path: The folder; `~` is the home directory.
        name: What to call the data set; the folder's name when not given.

    Raises:
        DataError: The folder or a part of it is missing, a file is corrupt or of another layout, or an image or label
            breaks the rules above. The message names the file and, where there is one, the row.
        MissingDependencyError: Hugging Face `datasets` or Pillow is not installed.
    """
    try:
        folder = Path(path).expanduser()
        files = _find_files(folder)
    except (OSError, RuntimeError) as error:  # not allowed to look, a name too long; `~` of an unknown user
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    train, test = ([read_parquet_file(file) for file in files[part]] for part in _PARTS)
    class_names = _class_names(train, test)
    _check_labels([*train, *test], len(class_names))
    _check_shapes([*train, *test])
    return ImageDataset(
        name=name or folder.name.strip(".") or folder.resolve().name,
        train=_join(train),
        test=_join(test),
        class_names=class_names,
    )


def _find_files(folder: Path) -> dict[str, list[Path]]:
    if not folder.exists():
        raise DataError(f"`path` (='{folder}') does not exist; pass the folder that holds `train-*.parquet`.")
    if not folder.is_dir():
        raise DataError(f"`path` (='{folder}') must be a folder, not a file; pass '{folder.parent}'.")
    places = [folder, *sorted(inner for inner in folder.iterdir() if inner.is_dir())]
    found = {place: {part: sorted(place.glob(f"{part}-*.parquet")) for part in _PARTS} for place in places}
    complete = [place for place in places if all(found[place].values())]
    if not complete:
        lacking = [f"`{part}-*.parquet`" for part in _PARTS if not any(files[part] for files in found.values())]
        raise DataError(
            f"`path` (='{folder}') must hold `train-*.parquet` and `test-*.parquet` in one place, the folder itself or "
            f"one directly inside it; {'it lacks ' + ' and '.join(lacking) if lacking else 'put them together'}."
        )
    if len(complete) > 1 and complete[0] != folder:
        names = ", ".join(place.name for place in complete)
        raise DataError(f"`path` (='{folder}') holds several data sets ({names}); pass the folder of one of them.")
    for part, files in found[complete[0]].items():
        _check_shards(part, files)
    return found[complete[0]]


def _check_shards(part: str, files: list[Path]) -> None:
    # A folder that was copied in part would otherwise pass for a smaller data set.
    totals = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))}
    if totals and totals != {len(files)}:
        raise DataError(
            f"'{files[0].parent}' holds {len(files)} `{part}-*.parquet`, but their names speak of "
            f"{' and '.join(str(total) for total in sorted(totals))}; complete the download, and keep one set of files."
        )


def _class_names(train: Sequence[ParquetImages], test: Sequence[ParquetImages]) -> tuple[str, ...]:
    first = train[0]
    for part in (*train, *test):
        if part.class_names != first.class_names:
            raise DataError(
                f"'{part.file}' has other class names in its metadata than '{first.file}'; "
                "write all files of a data set with the same features."
            )
    if first.class_names is not None:
        return first.class_names
    return tuple(str(label) for label in range(len({label for part in train for label in part.labels})))


def _check_labels(parts: Sequence[ParquetImages], num_classes: int) -> None:
    for part in parts:
        for row, label in enumerate(part.labels):
            if label is None or not 0 <= label < num_classes:
                raise DataError(
                    f"row {row} of '{part.file}' has the label {label}, but there are {num_classes} classes, so it "
                    f"must lie in 0..{num_classes - 1}; mend the row, or name all classes with a `ClassLabel` feature."
                )


def _check_shapes(parts: Sequence[ParquetImages]) -> None:
    first = parts[0]
    for part in parts:
        if part.images.shape[1:] != first.images.shape[1:]:
            raise DataError(
                f"'{part.file}' holds images of shape {tuple(part.images.shape[1:])} (channels, height, width), "
                f"'{first.file}' of {tuple(first.images.shape[1:])}; convert them all to one mode and size."
            )


def _join(parts: Sequence[ParquetImages]) -> ImageSplit:
    labels = torch.tensor([label for part in parts for label in part.labels])
    # Most data sets have one file a split: no second copy of its pixels then.
    images = parts[0].images if len(parts) == 1 else torch.cat([part.images for part in parts])
    return ImageSplit(images, labels)
