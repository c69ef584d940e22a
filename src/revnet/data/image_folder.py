"""A folder of image files: `train/<class>/*.jpg` beside `val/<class>/*.jpg`, as ImageNet lies on most disks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from revnet.data._base import ImageDataset
from revnet.data._batch import DEFAULT_IMAGE_SIZE, OnCorrupt
from revnet.data._crop import AbstractCrop, CentreCrop, RandomCrop
from revnet.data._file_split import FileSplit
from revnet.errors import DataError

_log = logging.getLogger("revnet.data")

_TRAIN = "train"
_TESTS = ("test", "val", "validation", "valid")
"""The first of them that holds a class folder is the test split; ImageNet's `test` holds images without labels."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


def is_image_folder(path: Path) -> bool:
    """Whether `load_image_folder` is the one to read a path: it holds a folder `train`, and no parquet files in that.

    Args:
        path: A folder; `~` is the home directory. False if there is nothing, or nothing to be read.
    """
    try:
        train = path.expanduser() / _TRAIN
        return train.is_dir() and not any(train.glob("*.parquet"))
    except (OSError, RuntimeError):  # whoever reads the path says what is wrong with it
        return False


def load_image_folder(
    path: str | Path,
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
    name: str | None = None,
) -> ImageDataset:
    """Load the data set that lies in a folder, one folder a class.

    `<path>/train/<class>/` holds the training images; `test/`, `val/`, `validation/` or `valid/` beside `train/` holds
    the test images of the same classes, or of some of them. Classes are numbered in the order of their folders' names.
    Only names are read here: the images, of any size, are decoded batch by batch and come out as RGB. Other files, and
    whatever begins with a dot, are passed over; folders inside a class's folder belong to the class.

    Training images get a random resized crop, test images the centre crop, see `load_dataset`.

    Args:
        path: The folder; `~` is the home directory.
        image_size: Height and width that images are brought to.
        on_corrupt: What to do about an image that cannot be decoded: "stop" raises a DataError naming it, "skip" leaves
            it out of its batch and says so once.
        crop_area: Least and largest share of a training image that a random crop takes.
        name: What to call the data set; the folder's name when not given.

    Raises:
        ValueError: An option is out of range.
        DataError: `train` or the folder for testing is missing, a class has no training image, or a test class is not
            one of `train`.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        folder = Path(path).expanduser()
        train = _class_folders(folder / _TRAIN)
        if not train:
            raise DataError(f"`path` (='{folder}') must hold '{_TRAIN}', with one folder of images for each class.")
        place, test = _test_folders(folder)
        class_names = tuple(train)
        _check_classes(place, test, class_names)
        splits = [
            _make_split(folders, class_names, image_size, crop, on_corrupt)
            for folders, crop in ((train, RandomCrop(crop_area)), (test, CentreCrop()))
        ]
    except (OSError, RuntimeError) as error:  # not allowed to look; `~` of an unknown user
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    name = name or folder.name.strip(".") or folder.resolve().name
    return ImageDataset(name=name, train=splits[0], test=splits[1], class_names=class_names)


def _class_folders(part: Path) -> dict[str, Path]:
    """The folders directly inside, by name, sorted; none where `part` is no folder."""
    if not part.is_dir():
        return {}
    with os.scandir(part) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    return {name: part / name for name in names}


def _test_folders(folder: Path) -> tuple[Path, dict[str, Path]]:
    for name in _TESTS:
        if classes := _class_folders(folder / name):
            return folder / name, classes
    raise DataError(
        f"'{folder}' must hold {', '.join(_TESTS[:-1])} or {_TESTS[-1]} beside '{_TRAIN}', with one folder of images "
        "for each class; move some of the training images there."
    )


def _check_classes(place: Path, test: dict[str, Path], class_names: tuple[str, ...]) -> None:
    unknown = sorted(test.keys() - set(class_names))
    if unknown:
        raise DataError(
            f"'{place / unknown[0]}' is a class that '{place.parent / _TRAIN}' does not have; give it training images, "
            "or take it away."
        )
    missing = [name for name in class_names if name not in test]
    if missing:
        _log.warning(
            "'%s' has no folder for %d of %d classes (the first is '%s'): the test accuracy speaks of the others alone",
            place,
            len(missing),
            len(class_names),
            missing[0],
        )


def _make_split(
    folders: dict[str, Path],
    class_names: tuple[str, ...],
    image_size: int,
    crop: AbstractCrop,
    on_corrupt: OnCorrupt,
) -> FileSplit:
    files: list[str] = []
    counts = [0] * len(class_names)
    for label, name in enumerate(class_names):
        if name not in folders:
            continue
        found = sorted(_image_files(str(folders[name])))
        if not found:
            raise DataError(
                f"'{folders[name]}' holds no images ({', '.join(_SUFFIXES)}); fill the folder, or take it away."
            )
        files += found
        counts[label] = len(found)
    labels = torch.arange(len(class_names)).repeat_interleave(torch.tensor(counts))
    return FileSplit(files, labels, image_size=image_size, crop=crop, on_corrupt=on_corrupt)


def _image_files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # Most entries are images; what the others are costs a look at the disk.
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(_SUFFIXES):
                yield entry.path
            elif entry.is_dir():
                yield from _image_files(entry.path)
