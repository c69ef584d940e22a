"""A folder of image files, `train/<class>/*.jpg` and `val/<class>/*.jpg`: the usual layout of ImageNet on disk."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from revnet._image_files import IMAGE_SUFFIXES, TESTS, TRAIN, class_folders, image_files, loose_images
from revnet._paths import expand_user
from revnet._units import counted
from revnet.data.decoding.corrupt import DEFAULT_IMAGE_SIZE, OnCorrupt
from revnet.data.decoding.crop import AbstractCrop, CenterCrop, RandomResizedCrop
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_dataset import ImageDataset
from revnet.errors import DataError

_Class = TypeVar("_Class", int, str)
_log = logging.getLogger("revnet.data")


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
    begin with a dot, are ignored; folders inside the folder of a class belong to the class. A warning names images
    outside the folders of classes, which are not used.

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
        folder = expand_user(path)
        folder.stat()  # raises if the folder does not exist
        train = class_folders(folder / TRAIN)
        if not train:
            raise DataError(f"`path` (='{folder}') must hold '{TRAIN}', with one folder of images for each class.")
        test_folder, test = _test_folders(folder)
        class_names = tuple(train)
        _check_classes(test_folder, test, class_names)
        for part in (folder / TRAIN, test_folder):
            warn_of_loose_images(part, loose_images(part))
        splits = [
            _make_split(folders, class_names, image_size, crop, on_corrupt)
            for folders, crop in ((train, RandomResizedCrop(crop_area)), (test, CenterCrop()))
        ]
    except OSError as error:  # no permission
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    return ImageDataset(name=name or name_of_folder(folder), train=splits[0], test=splits[1], class_names=class_names)


def name_of_folder(folder: Path) -> str:
    """Return the name of the data set in a folder, on one line."""
    name = folder.name.strip(".") or folder.resolve().name
    return " ".join(name.split()) or name


def warn_of_loose_images(folder: Path, loose: list[str]) -> None:
    """Log a warning of the images that are directly in `folder`, outside the folders of its classes."""
    if loose:
        _log.warning(
            "'%s' holds %s outside the folders of its classes (the first is '%s'), which %s not used",
            folder,
            counted(len(loose), "image"),
            loose[0],
            "are" if len(loose) > 1 else "is",
        )


def class_files(folders: Mapping[_Class, Path]) -> dict[_Class, list[str]]:
    """Return the images in the folder of each class, sorted; warn of images in formats that are not read.

    Raises:
        DataError: A class has none.
    """
    others: list[str] = []
    files = {name: _class_files(folder, others) for name, folder in folders.items()}
    if others:
        _log.warning(
            "%s left out, because revnet does not read the format (the first is '%s'); convert to JPEG or PNG",
            f"{counted(len(others), 'image')} {'is' if len(others) == 1 else 'are'}",
            min(others),
        )
    return files


def _class_files(folder: Path, others: list[str]) -> list[str]:
    files = sorted(image_files(folder, others))
    if not files:
        raise DataError(f"'{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)}); add images, or remove the folder.")
    return files


def _test_folders(folder: Path) -> tuple[Path, dict[str, Path]]:
    for name in TESTS:
        if classes := class_folders(folder / name):
            return folder / name, classes
    raise DataError(
        f"'{folder}' must hold {', '.join(TESTS[:-1])} or {TESTS[-1]} next to '{TRAIN}', with one folder of images "
        f"for each class; move some of the training images there, or pass '{folder / TRAIN}', whose images are divided."
    )


def _check_classes(test_folder: Path, test: dict[str, Path], class_names: tuple[str, ...]) -> None:
    unknown = sorted(test.keys() - set(class_names))
    if unknown:
        raise DataError(
            f"'{test_folder / unknown[0]}' is a class that '{test_folder.parent / TRAIN}' does not have; add training "
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
    files = class_files({label: folders[name] for label, name in enumerate(class_names) if name in folders})
    return split_of_classes(files, image_size, crop, on_corrupt)


def split_of_classes(
    files: dict[int, list[str]], image_size: int, crop: AbstractCrop, on_corrupt: OnCorrupt
) -> FileSplit:
    """Return the split with the files of each label."""
    labels = torch.tensor([label for label, names in files.items() for _ in names])
    return FileSplit(
        [name for names in files.values() for name in names],
        labels,
        image_size=image_size,
        crop=crop,
        on_corrupt=on_corrupt,
    )
