"""Helpers for data sets of images, which two of the families train on."""

import os
from pathlib import Path

from torch import Tensor

from revnet._image_files import IMAGE_SUFFIXES, explain_link, is_pattern
from revnet._paths import absolute_path, expand_user
from revnet._units import counted
from revnet.data import ImageDataset, list_datasets, load_image
from revnet.data.decoding.decode import most_pixels
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.errors import DataError
from revnet.training.import_path import is_import_path

TEST_CROP = 0.875
"""Share of a test image that `load_dataset` keeps when it resizes."""


def absolute_data(data: str) -> str:
    """Return the name of a data set, or the absolute path of a folder.

    A run with an absolute path can be resumed and evaluated in any working directory. What does not exist is returned
    as it is, for the error message.
    """
    is_name = data in list_datasets() or data.startswith("hub:") or is_import_path(data)
    exists = os.path.exists(expand_user(data))  # noqa: PTH110 - `Path` fails for names that are too long
    return absolute_path(data) if not is_name and exists else data


def describe_splits(training: AbstractSplit, validation: AbstractSplit | None, test: AbstractSplit) -> str:
    """Return the number of images in each part of a data set as text."""
    parts = {"train": training, "validate": validation, "test": test}
    return ", ".join(f"{len(part):,} {verb}" for verb, part in parts.items() if part is not None)


def check_batch_size(batch_size: int, training: AbstractSplit) -> None:
    """Raise unless the training images fill a batch."""
    if batch_size > len(training):
        raise ValueError(
            f"`batch_size` (={batch_size}) must not exceed the {counted(len(training), 'training image')}; pass "
            f"{len(training)} or less."
        )


def check_classes(data: str, dataset: ImageDataset) -> None:
    """Raise unless there are several classes to tell apart."""
    if dataset.num_classes < 2:
        raise ValueError(
            f"`data` (='{data}') has a single class, '{dataset.class_names[0]}', and a classifier needs two or more; "
            "add a folder of images for each other class."
        )


def hold_out(dataset: ImageDataset, val_fraction: float, seed: int) -> tuple[AbstractSplit, AbstractSplit | None]:
    """Return the training images and the validation images; None if `val_fraction` is 0."""
    if val_fraction == 0:
        return dataset.train, None
    dataset.check_holdout("val_fraction", val_fraction)
    return dataset.holdout(val_fraction, seed)


def describe_division(dataset: ImageDataset) -> list[tuple[str, str]]:
    """Return the line about the choice of the test images, if the data came without a test set."""
    if dataset.division is None:
        return []
    how = f"chosen by seed {dataset.division.seed} and the names of the files"
    return [("test set", f"{counted(len(dataset.test), 'image')}, a fifth of each class, {how}")]


def read_image(file: Path, image_shape: tuple[int, int, int], *, is_resized: bool) -> Tensor:
    """Read an image file as a test image of a trained model.

    Args:
        file: The file.
        image_shape: Shape of the images that the model takes, (C, H, W).
        is_resized: Whether the images of the data set were resized and cropped.

    Raises:
        DataError: The file is missing or not an image, or it is a folder or a pattern without images.
    """
    if is_pattern(file):
        raise DataError(f"'{file}' matches no files; check the pattern.")
    if (fault := explain_link(file)) is not None:
        raise DataError(f"'{file}' {fault}.")
    if file.is_dir():
        raise DataError(f"'{file}' holds no images ({', '.join(IMAGE_SUFFIXES)}); pass a folder that does.")
    channels, height, width = image_shape
    if height * width > most_pixels():
        raise DataError(
            f"'{file}' would be resized to {height:,} x {width:,} pixels, as the weights say, which is more than "
            f"{most_pixels():,}; if you trust the weights, set REVNET_MAX_PIXELS to a larger number."
        )
    crop_fraction = TEST_CROP if is_resized else 1.0
    return load_image(file, image_size=(height, width), in_channels=channels, crop_fraction=crop_fraction)
