"""A folder of image files, `train/<class>/*.jpg` and `val/<class>/*.jpg`: the usual layout of ImageNet on disk."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from revnet.data.decoding.corrupt import DEFAULT_IMAGE_SIZE, OnCorrupt
from revnet.data.decoding.crop import AbstractCrop, CenterCrop, RandomResizedCrop
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_dataset import ImageDataset
from revnet.errors import DataError

_log = logging.getLogger("revnet.data")

_TRAIN = "train"
_TESTS = ("test", "val", "validation", "valid")
"""Possible names of the test split; the first with a class folder is used (ImageNet's `test` is unlabeled)."""

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


def is_image_folder(path: Path) -> bool:
    """Return whether `load_image_folder` should read a path: it holds a folder `train` without parquet files.

    False if the path does not exist or cannot be read.

    Args:
        path: A folder; `~` is the home directory.
    """
    try:
        train = path.expanduser() / _TRAIN
        return train.is_dir() and not any(train.glob("*.parquet"))
    except (OSError, RuntimeError):  # reading the path raises an error that explains the problem
        return False


def load_image_folder(
    path: str | Path,
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
    name: str | None = None,
) -> ImageDataset:
    """Load a data set from a folder with one folder per class.

    `<path>/train/<class>/` holds the training images; `<path>/test/`, `val/`, `validation/` or `valid/` holds the test
    images of the same classes, or of some of them. Classes are numbered in the order of their folder names. Only names
    are read at this point: the images, of any size, are decoded to RGB batch by batch. Other files, and names that
    begin with a dot, are ignored; folders inside the folder of a class belong to the class.

    Training images get a random resized crop, test images the center crop, see `load_dataset`.

    Args:
        path: The folder; `~` is the home directory.
        image_size: Height and width of the decoded images.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError that names the image,
            "skip" leaves the image out of its batch and logs it once.
        crop_area: Smallest and largest share of a training image that a random crop keeps.
        name: Name of the data set; by default the name of the folder.

    Raises:
        ValueError: An option is out of range.
        DataError: `train` or the test folder is missing, a class has no training image, or a test class is not in
            `train`.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        folder = Path(path).expanduser()
        train = _class_folders(folder / _TRAIN)
        if not train:
            raise DataError(f"`path` (='{folder}') must hold '{_TRAIN}', with one folder of images for each class.")
        test_folder, test = _test_folders(folder)
        class_names = tuple(train)
        _check_classes(test_folder, test, class_names)
        splits = [
            _make_split(folders, class_names, image_size, crop, on_corrupt)
            for folders, crop in ((train, RandomResizedCrop(crop_area)), (test, CenterCrop()))
        ]
    except (OSError, RuntimeError) as error:  # no permission; `~` of an unknown user
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    name = name or folder.name.strip(".") or folder.resolve().name
    return ImageDataset(name=name, train=splits[0], test=splits[1], class_names=class_names)


def find_image_files(folder: Path) -> list[str]:
    """Return the paths of all image files in a folder and in the folders inside it, sorted."""
    return sorted(_image_files(str(folder)))


def _class_folders(part: Path) -> dict[str, Path]:
    """Return the folders directly inside `part`, by name, sorted; empty if `part` is not a folder."""
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
        f"'{folder}' must hold {', '.join(_TESTS[:-1])} or {_TESTS[-1]} next to '{_TRAIN}', with one folder of images "
        "for each class; move some of the training images there."
    )


def _check_classes(test_folder: Path, test: dict[str, Path], class_names: tuple[str, ...]) -> None:
    unknown = sorted(test.keys() - set(class_names))
    if unknown:
        raise DataError(
            f"'{test_folder / unknown[0]}' is a class that '{test_folder.parent / _TRAIN}' does not have; add training "
            "images, or remove the class."
        )
    missing = [name for name in class_names if name not in test]
    if missing:
        _log.warning(
            "'%s' has no folder for %d of %d classes (the first is '%s'): the test accuracy covers only the others",
            test_folder,
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
        class_files = sorted(_image_files(str(folders[name])))
        if not class_files:
            raise DataError(
                f"'{folders[name]}' holds no images ({', '.join(_SUFFIXES)}); add images, or remove the folder."
            )
        files += class_files
        counts[label] = len(class_files)
    labels = torch.arange(len(class_names)).repeat_interleave(torch.tensor(counts))
    return FileSplit(files, labels, image_size=image_size, crop=crop, on_corrupt=on_corrupt)


def _image_files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # Checks by name come first, since `is_dir` may have to read from the disk.
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(_SUFFIXES):
                yield entry.path
            elif entry.is_dir():
                yield from _image_files(entry.path)
